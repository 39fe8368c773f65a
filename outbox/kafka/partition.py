"""The records of one partition, settled one after the other.

The invariant: **every record below `settled` is settled in the database**, so its offset may be committed. It holds
because one thread at a time is in a partition (`_is_in_hand`), takes the first record that waits, and moves `settled`
past it only when the receiver has returned. A record that cannot be settled (the database is away) is tried again and
again, and holds up its own partition, until the partition is taken away; then it stays above `settled`, and whoever
has the partition next gets it.

With a batch size, the first few are taken together. They are one transaction, and one by one in their order what that
leaves out; only then `settled` moves, past all of them.

Kafka does not say which record was handed out before. Those that a worker had in hand when it died are, in their
partition, the first ones that are not settled, no more than a batch of them: between them and the offset that was
committed last there are only settled ones, as they are taken in order. So from where a partition is taken up, records
are taken alone and treated as handed out before, which notes an attempt before the handler runs, until this worker has
acted on as many as a batch has and survived. What comes after that was in nobody's hands when a worker died, unless in
those of one that the group had already given up; what that one died of, this one dies of once, and finds it there the
next time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

from outbox.crash_points import crash_point
from outbox.receive import NotSettled, Outcome, Receipt

log = logging.getLogger(__name__)

_TURN: Final = 100
"""So many records of one partition, and the thread looks after another one."""
_PAUSE: Final = 1.0
_ACTED: Final = {Outcome.HANDLED, Outcome.RETRY}
"""Outcomes that no record has which was settled before."""

Receive = Callable[..., list[Receipt | None]]
"""`RecordReceiver.receive`."""


class Partition:
    """One partition while it is assigned to this process; a new object each time that it is."""

    def __init__(self, topic: str, number: int, receive: Receive, batch: int = 1) -> None:
        """*batch*: so many records may be taken in one transaction."""
        self.topic = topic
        self.number = number
        self.settled: int | None = None
        """The offset after the last record that is settled; None as long as there is none."""
        self.committed: int | None = None
        self.is_paused = False
        self._receive = receive
        self._batch = batch
        self._waiting: deque[Any] = deque()
        self._suspects = batch
        """So many records may have been in a dead worker's hands."""
        self._lock = threading.Lock()
        self._is_in_hand = False
        self._is_taken_away = threading.Event()
        self._is_at_rest = threading.Event()
        self._is_at_rest.set()

    def __str__(self) -> str:
        return f"{self.topic} [{self.number}]"

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, record: Any) -> bool:
        """Let *record* wait; whether a thread must now be found for the partition."""
        with self._lock:
            self._waiting.append(record)
            if self._is_in_hand:
                return False
            self._is_in_hand = True
            self._is_at_rest.clear()
            return True

    def work(self) -> bool:
        """Settle some of what waits; whether there is more to do."""
        for _ in range(_TURN):
            with self._lock:
                if not self._waiting or self._is_taken_away.is_set():
                    self._is_in_hand = False
                    self._is_at_rest.set()
                    return False
                count = 1 if self._suspects else self._batch
                records = list(islice(self._waiting, count))
            for _ in range(self._settle(records)):
                self.settled = self._waiting.popleft().offset() + 1
        return True

    def take_away(self) -> None:
        """Begin no further record. `settled` may move once more, by the one in hand."""
        self._is_taken_away.set()

    def await_rest(self, timeout: float) -> bool:
        """Wait for the record in hand, *timeout* seconds at most; whether `settled` is final."""
        return self._is_at_rest.wait(max(0.0, timeout))

    def _settle(self, records: list[Any]) -> int:
        """How many of *records* were settled before the partition was taken away."""
        redelivered = self._suspects > 0
        while not self._is_taken_away.is_set():
            try:
                receipts = self._receive(records, redelivered=redelivered)
            except NotSettled as error:
                log.warning("%s at %d waits: %s", self, records[0].offset(), error)
            except BaseException:
                # Whatever it is, going on would lose the record. Tried alone, and as one handed out
                # before, it is parked in the end if it is the record's own doing.
                log.exception("%s at %d is tried again", self, records[0].offset())
                redelivered, self._suspects = True, self._batch
                records = records[:1]
            else:
                crash_point("receive.before_ack")
                acted = sum(map(_was_acted_on, receipts))
                self._suspects = max(0, self._suspects - acted)
                return len(records)
            self._is_taken_away.wait(_PAUSE)
        return 0


def _was_acted_on(receipt: Receipt | None) -> bool:
    return receipt is not None and not _ACTED.isdisjoint(receipt.outcomes.values())


def wait_for_all(partitions: list[Partition], timeout: float) -> list[Partition]:
    """Wait until nothing of *partitions* is in hand any more; those where something still is."""
    deadline = time.monotonic() + timeout
    return [one for one in partitions if not one.await_rest(deadline - time.monotonic())]
