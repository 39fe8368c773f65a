"""Busy keys: ordered keys with many events, whose rows must not be looked for among their dead versions.

A row that is updated for each event leaves a version behind. While some transaction holds the xmin
horizon none of them goes away, and whoever looks the row up by a unique index meets all of them,
oldest first. So a key's row (`outbox_key`, `inbox_order`) serves for its first `SPAN` numbers. Then the
key moves to a row in `outbox_busy_key` or `inbox_busy_order`, whose index goes on with the row's
*span*: the hundred that its number is in. The newest version is the last entry of its key there, and
an index that is read from its end meets the versions of that one span. Most updates still leave the
index alone (HOT), as the span seldom changes.

Why there is one counter to a key: the first row is unique by its key, is never deleted while its key may
be counted on, and says from the key's moving on that it has moved. The one transaction that says so
holds its lock, and makes the other row. That one is only ever *updated*. So who comes with an old
snapshot waits for it, and goes on from its newest version or fails with 40001, as on any row: no
number is drawn from what somebody has moved on from. Rows that are inserted for each span, with the old ones
deleted, would be flat as well; but a snapshot from before could insert a deleted one again.

Which keys have moved is remembered here, so that their first rows are not asked in vain. It is a hint:
one that is wrong or missing costs a round trip. Within a transaction none should get lost: who has a busy row, and
then asks the first row, waits for whoever has that one and waits for the busy row. So what was used lately stays.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

SPAN: Final = 100
"""Numbers of a key that have one place in the index. `count_busy_key` (schema/v002.py) has it too."""
_REMEMBERED: Final = 25_000


class BusyKeys:
    """The keys that this process has met as busy: at least the last *remembered* ones. Threads may share it."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._newer: set[Hashable] = set()
        self._older: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        if key in self._newer:
            return True
        if key not in self._older:
            return False
        self.add(key)
        return True

    def forget(self) -> None:
        """Know no key any more, as a new process does."""
        self._newer, self._older = set(), set()

    def add(self, key: Hashable) -> None:
        """Remember *key*."""
        newer = self._newer
        newer.add(key)
        # Another thread may have put the full set aside by now: a second time would drop all that is in it.
        if len(newer) >= self._remembered and self._newer is newer:
            self._older, self._newer = newer, set()
