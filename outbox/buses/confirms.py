"""Which messages of one channel the broker has taken: publisher confirms, kept by delivery tag.

py-amqp's own `basic_publish_confirm` takes *any* ack for the answer to its message: after a timeout, the late ack of
message 1 passes for that of message 2, which may be lost. Here an ack counts for the tags that it names, on the channel
that they were given by, and none counts that comes after a refusal: an ack for many could pass the refused one over.
"""

from __future__ import annotations

from outbox.errors import BusError


class Confirms:
    """The delivery tags of one channel. Tags are given from 1 on, in the order of publishing."""

    def __init__(self) -> None:
        self.given = 0
        """The last tag that was used."""
        self.taken = 0
        """Every tag up to this one has been acked."""
        self._ahead: set[int] = set()
        self._failure: str | None = None

    def give(self, count: int) -> int:
        """Count *count* more messages as published; the last one's tag."""
        self.given += count
        return self.given

    def has_taken(self, tag: int) -> bool:
        """Whether the broker has taken everything up to *tag*. Raises `BusError` once it never will."""
        if self.taken >= tag:
            return True
        if self._failure is not None:
            raise BusError(self._failure)
        return False

    def acked(self, tag: int, multiple: bool) -> None:
        """The broker has taken *tag*, or with *multiple* everything up to it."""
        if self._failure is not None or tag <= self.taken:
            return
        if tag > self.given:
            self.fail(f"the broker confirmed message {tag}, and {self.given} were sent")
        elif multiple or tag == self.taken + 1:
            self._advance(tag)
        else:
            self._ahead.add(tag)

    def nacked(self, tag: int, multiple: bool) -> None:
        """The broker refused: a full queue that rejects, or an error of its own."""
        self.fail(f"the broker refused message {tag}" + (" and others before it" * multiple))

    def fail(self, why: str) -> None:
        """From now on nothing more counts as taken, whatever the broker says. The first reason stays."""
        self._failure = self._failure or why

    def _advance(self, tag: int) -> None:
        self.taken = tag
        while self.taken + 1 in self._ahead:
            self.taken += 1
            self._ahead.discard(self.taken)
        if len(self._ahead) > self.given - self.taken:
            # An ack for many has passed some of them over.
            self._ahead = {later for later in self._ahead if later > self.taken}
