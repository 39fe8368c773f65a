"""What the broker has confirmed since the last roll, remembered, so that the next roll need not read the log again.

A roll names what is delivered by its cursor and was not by the cursor of the roll before (`outbox.rolls`). The relay
that stored that one, and has kept the lane since, has had all of it in its own hands: every page between the two
cursors was confirmed to it. So it remembers, and asks the log only where that does not hold: for the first roll of a
lane after it was taken, and where there is too much to remember.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from outbox.buses.base import OutgoingMessage


class HandedOver:
    """Records of events (as `outbox.rolls` packs them) by lane and type. For one thread."""

    def __init__(self, most: int) -> None:
        """*most*: how many events are remembered."""
        self._most = most
        self._count = 0
        self._begun: set[int] = set()
        self._records: defaultdict[tuple[int, str], list[str]] = defaultdict(list)

    def begin(self, lanes: Iterable[int]) -> None:
        """The last roll of *lanes* names everything that was added by now."""
        self._begun.update(lanes)

    def add(self, events: Sequence[OutgoingMessage]) -> None:
        """A page was confirmed."""
        self._count += len(events)
        if self._count > self._most:
            self.forget()
            return
        records = self._records
        for id, type, _, _, lane, position, _, _, _ in events:
            records[lane, type].append(f"{id}{position:016x}")

    def knows(self, lane: int) -> bool:
        """Whether all that was confirmed of *lane* since its last roll is remembered."""
        return lane in self._begun

    def take(self, lanes: Collection[int]) -> dict[tuple[int, str], bytes]:
        """The records of those of *lanes* that are known. All of them begin anew after this."""
        taken = {key: self._records.pop(key) for key in list(self._records) if key[0] in lanes}
        known = {key: _packed(records) for key, records in taken.items() if self.knows(key[0])}
        self._count -= sum(map(len, taken.values()))
        self._begun.difference_update(lanes)
        return known

    def forget(self) -> None:
        """Know nothing of any lane."""
        self._count = 0
        self._begun.clear()
        self._records.clear()


def _packed(records: Iterable[str]) -> bytes:
    return bytes.fromhex("".join(records).replace("-", ""))
