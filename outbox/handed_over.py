"""What the broker has confirmed since the last roll, remembered, so that the next roll need not read the log again.

A roll names what is delivered by its cursor and was not by the cursor of the roll before (`outbox.rolls`). The relay
that stored that one, and has kept the lane since, has had all of it in its own hands: every page between the two
cursors was confirmed to it. So it remembers, and asks the log only where that does not hold: for the first roll of a
lane after it was taken, and where there is too much to remember.
"""

from __future__ import annotations

import sys
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from outbox.buses.base import OutgoingMessage
from outbox.rolls import RECORD_BYTES

_WORDS: Final = RECORD_BYTES // 8

Records = Mapping[tuple[int, str], list[Any]]
"""By lane and type: an id as text, its position, the next id and so on. (Two lists would cost more than all the rest.)
"""


def records_of(events: Iterable[OutgoingMessage]) -> Records:
    """What is remembered of *events*, made while they are in the processor's cache, so that they can be let go."""
    records: defaultdict[tuple[int, str], list[Any]] = defaultdict(list)
    for id, type, _, _, lane, position, _, _, _ in events:
        its = records[lane, type]
        its.append(id)
        its.append(position)
    return records


class HandedOver:
    """Ids and positions of events by lane and type. For one thread."""

    def __init__(self, most: int) -> None:
        """*most*: how many events are remembered."""
        self._most = most
        self._count = 0
        self._begun: set[int] = set()
        self._records: defaultdict[tuple[int, str], list[Any]] = defaultdict(list)

    def begin(self, lanes: Iterable[int]) -> None:
        """The last roll of *lanes* names everything that was added by now."""
        self._begun.update(lanes)

    def add(self, records: Records) -> None:
        """What they are of was confirmed."""
        self._count += sum(map(len, records.values())) // 2
        if self._count > self._most:
            self.forget()
            return
        for key, its in records.items():
            self._records[key].extend(its)

    def knows(self, lane: int) -> bool:
        """Whether all that was confirmed of *lane* since its last roll is remembered."""
        return lane in self._begun

    def take(self, lanes: Collection[int]) -> dict[tuple[int, str], bytes]:
        """The records, as `outbox.rolls` packs them, of those of *lanes* that are known. All begin anew after this."""
        taken = {key: self._records.pop(key) for key in list(self._records) if key[0] in lanes}
        known = {
            key: _packed(its[::2], its[1::2]) for key, its in taken.items() if self.knows(key[0])
        }
        self._count -= sum(map(len, taken.values())) // 2
        self._begun.difference_update(lanes)
        return known

    def forget(self) -> None:
        """Know nothing of any lane."""
        self._count = 0
        self._begun.clear()
        self._records.clear()


def _packed(ids: Sequence[str], positions: Sequence[int]) -> bytes:
    """Each id's two words and its position, in network order, put in place for all of them at once."""
    halves = array("Q", bytes.fromhex("".join(ids).replace("-", "")))
    places = array("Q", positions)
    if sys.byteorder == "little":
        places.byteswap()
    words = array("Q", bytes(RECORD_BYTES * len(places)))
    words[::_WORDS], words[1::_WORDS], words[2::_WORDS] = halves[::2], halves[1::2], places
    return words.tobytes()
