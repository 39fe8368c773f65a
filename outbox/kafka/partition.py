"""The records of one partition, settled one after the other.

The invariant: **every record below `settled` is settled in the database**, so its offset may be committed. It holds
because one thread at a time is in a partition (`_is_in_hand`), takes the first record that waits, and moves `settled`
past it only when the receiver has returned. A record that cannot be settled (the database is away) is tried again and
again, and holds up its own partition, until the partition is taken away; then it stays above `settled`, and whoever
has the partition next gets it.

Kafka does not say which record was handed out before. The one that killed a worker is, in its partition, the first
that is not settled: between it and the offset that was committed last there are only settled ones, as they are taken
in order. So from where a partition is taken up, each record is treated as handed out before, which notes an attempt
before the handler runs, up to the first one that this worker acts on and survives. What comes after that was in
nobody's hands when a worker died, unless in those of one that the group had already given up; what that one died of,
this one dies of once, and finds it first in its partition the next time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from outbox.crash_points import crash_point
from outbox.receive import NotSettled, Outcome, Receipt

log = logging.getLogger(__name__)

_TURN: Final = 100
"""So many records of one partition, and the thread looks after another one."""
_PAUSE: Final = 1.0
_ACTED: Final = {Outcome.HANDLED, Outcome.RETRY}
"""Outcomes that no record has which was settled before."""

Receive = Callable[..., Receipt | None]
"""`RecordReceiver.receive`."""


class Partition:
    """One partition while it is assigned to this process; a new object each time that it is."""

    def __init__(self, topic: str, number: int, receive: Receive) -> None:
        self.topic = topic
        self.number = number
        self.settled: int | None = None
        """The offset after the last record that is settled; None as long as there is none."""
        self.committed: int | None = None
        self.is_paused = False
        self._receive = receive
        self._waiting: deque[Any] = deque()
        self._may_be_second = True
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
                record = self._waiting[0]
            if self._settle(record):
                self.settled = record.offset() + 1
                self._waiting.popleft()
        return True

    def take_away(self) -> None:
        """Begin no further record. `settled` may move once more, by the one in hand."""
        self._is_taken_away.set()

    def await_rest(self, timeout: float) -> bool:
        """Wait for the record in hand, *timeout* seconds at most; whether `settled` is final."""
        return self._is_at_rest.wait(max(0.0, timeout))

    def _settle(self, record: Any) -> bool:
        """Whether *record* was settled before the partition was taken away."""
        redelivered = self._may_be_second
        while not self._is_taken_away.is_set():
            try:
                receipt = self._receive(record, redelivered=redelivered)
            except NotSettled as error:
                log.warning("%s at %d waits: %s", self, record.offset(), error)
            except BaseException:
                # Whatever it is, going on would lose the record. Tried as one handed out before, it
                # is parked in the end if it is the record's own doing.
                log.exception("%s at %d is tried again", self, record.offset())
                redelivered = True
            else:
                crash_point("receive.before_ack")
                if receipt is not None and not _ACTED.isdisjoint(receipt.outcomes.values()):
                    self._may_be_second = False
                return True
            self._is_taken_away.wait(_PAUSE)
        return False


def wait_for_all(partitions: list[Partition], timeout: float) -> list[Partition]:
    """Wait until nothing of *partitions* is in hand any more; those where something still is."""
    deadline = time.monotonic() + timeout
    return [one for one in partitions if not one.await_rest(deadline - time.monotonic())]
