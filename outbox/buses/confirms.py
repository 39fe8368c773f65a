"""Which messages of one channel the broker has taken: publisher confirms, kept by delivery tag.

py-amqp's own `basic_publish_confirm` takes *any* ack for the answer to its message: after a timeout, the late ack of
message 1 passes for that of message 2, which may be lost. Here an ack counts for the tags that it names, on the channel
that they were given by, and after any doubt the channel is thrown away with all its tags.
"""

from __future__ import annotations


class Confirms:
    """The delivery tags of one channel. Tags are given from 1 on, in the order of publishing."""

    def __init__(self) -> None:
        self.given = 0
        """The last tag that was used."""
        self.taken = 0
        """Every tag up to this one has been acked."""
        self.failure: str | None = None
        """Why nothing on this channel can be trusted any more."""
        self._ahead: set[int] = set()

    def acked(self, tag: int, multiple: bool) -> None:
        """The broker has taken *tag*, or with *multiple* everything up to it."""
        if multiple:
            self.taken = max(self.taken, tag)
            self._ahead = {later for later in self._ahead if later > self.taken}
        else:
            self._ahead.add(tag)
        while self.taken + 1 in self._ahead:
            self.taken += 1
            self._ahead.discard(self.taken)

    def nacked(self, tag: int, multiple: bool) -> None:
        """The broker refused: a full queue that rejects, or an error of its own."""
        self.failure = f"the broker refused message {tag}" + (
            " and those before it" if multiple else ""
        )
