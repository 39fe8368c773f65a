"""Pages on their way from the log to the broker: read, sent, confirmed, and only then stored.

The stored cursor only ever follows confirmations, in order, a whole page at a time; what fails or dies before that is
read and sent again. So `confirmed` of a group of lanes never passes a page that the broker has not taken, and `read`
goes back to it after any refusal.

A pipeline lives as long as its database connection does, and is used by one thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from random import Random
from typing import Any, Final

import psycopg

from outbox.buses.base import Bus, Confirmation, OutgoingMessage
from outbox.crash_points import crash_point
from outbox.cursors import CursorStore
from outbox.errors import BusError, LeaseLost
from outbox.reader import Cursor, LogReader, Page
from outbox.roll_caller import RollCaller

log = logging.getLogger(__name__)

_STORE_EVERY: Final = 0.1
_FIRST_ROWS: Final = 64
_AT_ONCE: Final = float("inf")
_BODY: Final = attrgetter("body")
_LANE: Final = attrgetter("lane")


@dataclass
class RelayStats:
    """What a relay has done since it started."""

    sent: int = 0
    confirmed: int = 0
    failures: int = 0
    """Batches that the broker did not confirm, and lost database connections."""
    refusals: int = 0
    """Batches that the broker did not confirm since it last did."""
    refused_since: float = 0.0
    """When the first of those was refused, by the monotonic clock."""

    def refuse(self) -> None:
        """The broker did not confirm."""
        if not self.refusals:
            self.refused_since = time.monotonic()
        self.failures += 1
        self.refusals += 1

    def forgive(self) -> None:
        """It has confirmed again, or may have another try."""
        self.refusals = 0

    def refused_for(self) -> float:
        """For how many seconds the broker has confirmed nothing of what it was given."""
        return time.monotonic() - self.refused_since if self.refusals else 0.0


@dataclass
class _Group:
    """Lanes that are read by one statement, and how far they are confirmed."""

    read: Cursor
    confirmed: Cursor
    drained: bool = False
    """Whether the last page was everything that there was."""


@dataclass
class _InFlight:
    confirmation: Confirmation
    group: _Group
    page: Page


class Pipeline:
    """The pages of the lanes that one relay holds."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        reader: LogReader,
        cursors: CursorStore,
        bus: Bus,
        rolls: RollCaller | None,
        stats: RelayStats,
        *,
        held: Callable[[], dict[int, int]],
        rest: Callable[[float], object],
        page_rows: int,
        page_bytes: int,
        in_flight: int,
    ) -> None:
        """*held*: the lanes leased now, with their epochs. *rest*: waits some seconds, or until the relay stops.

        *page_rows*: fresh events read of each lane at a time, fewer while pages are larger than *page_bytes*.
        *in_flight*: pages that may wait for the broker's confirmation.
        """
        self.epochs: dict[int, int] = {}
        """The lanes that are read, as they were leased."""
        self._connection = connection
        self._reader = reader
        self._cursors = cursors
        self._bus = bus
        self._rolls = rolls
        self._stats = stats
        self._held = held
        self._rest = rest
        self._most_rows, self._most_bytes = page_rows, page_bytes
        self._most_in_flight = in_flight
        self._groups: list[_Group] = []
        self._in_flight: deque[_InFlight] = deque()
        self._rows = _FIRST_ROWS
        self._stored_at = 0.0
        self._unstored: set[int] = set()

    def confirmed(self) -> list[Cursor]:
        """How far the lanes are confirmed, where a cursor can say it."""
        return [group.confirmed for group in self._groups if not group.confirmed.late]

    def turn(self) -> bool:
        """Read and send one page of each group; True if there was anything."""
        try:
            moved = False
            for group in list(self._groups):
                moved |= self._send_page(group)
            if len(self._groups) > 1:
                self._merge()
            self._await(everything=not moved)
        except BusError as error:
            self.begin_again(error)
            return False
        return moved

    def follow_leases(self) -> None:
        """Read the lanes that are held now, the new ones from where they were left."""
        if self._held() == self.epochs:
            return
        try:
            self._await(everything=True)
            self.store()
        except BusError as error:
            self.begin_again(error)
        self._reload(self._held())

    def begin_again(self, error: BusError) -> None:
        """The broker did not confirm: everything after the last confirmation is read and sent again."""
        self._stats.refuse()
        log.warning("%s; sending again", error)
        self._in_flight.clear()
        for group in self._groups:
            group.read, group.drained = group.confirmed, False
        self._rest(min(0.2 * 2 ** min(self._stats.refusals, 5), 5) * Random().random())  # noqa: S311

    def store(self, now: float = _AT_ONCE) -> None:
        """Store how far the lanes are confirmed, unless that was done a moment before *now* (monotonic)."""
        if not self._unstored or now - self._stored_at < _STORE_EVERY:
            return
        if any(group.confirmed.late for group in self._groups):
            return  # within a huge late transaction there is no snapshot that says what was delivered
        for group in self._groups:
            his = {lane: hi for lane, hi in group.confirmed.his.items() if lane in self._unstored}
            try:
                self._cursors.store(Cursor(his, group.confirmed.snapshot), self.epochs)
            except LeaseLost as error:
                log.info("%s", error)
                self._reload({})
                return
        self._unstored.clear()
        self._stored_at = now
        crash_point("relay.stored")

    def store_all(self) -> None:
        """Store every lane's cursor, also where nothing has come."""
        self._unstored.update(self.epochs)
        self.store()

    def finish(self) -> None:
        """Let what is under way be confirmed, and store it."""
        try:
            self._await(everything=True)
            self.store()
        except BusError as error:
            log.warning("%s; left for the next relay", error)

    def _send_page(self, group: _Group) -> bool:
        if group.drained and self._reader.unchanged_since(group.read):
            return False
        page = self._reader.read(group.read, self._rows)
        crash_point("relay.read")
        group.read, group.drained = page.cursor, page.complete
        if not page.events:
            if not self._in_flight:
                group.confirmed = page.cursor
            return False
        if not self._held():
            raise BusError("this relay was paused for longer than its lease")
        confirmation = self._bus.send(page.events)
        self._stats.sent += len(page.events)
        crash_point("relay.sent")
        self._in_flight.append(_InFlight(confirmation, group, page))
        self._adapt(page)
        return True

    def _await(self, *, everything: bool) -> None:
        while self._in_flight and (everything or len(self._in_flight) >= self._most_in_flight):
            sent = self._in_flight[0]
            sent.confirmation.wait()
            crash_point("relay.confirmed")
            self._in_flight.popleft()
            self._stats.forgive()
            sent.group.confirmed = sent.page.cursor
            self._note_confirmed(sent.page.events)
            self._unstored.update(map(_LANE, sent.page.events))
            self.store(time.monotonic())

    def _note_confirmed(self, events: Sequence[OutgoingMessage]) -> None:
        self._stats.confirmed += len(events)
        if self._rolls is not None:
            self._rolls.handed_over(events)

    def _reload(self, epochs: dict[int, int]) -> None:
        """Go on from the stored cursors: another relay may have moved them."""
        self._in_flight.clear()
        self._unstored.clear()
        self.epochs = epochs
        cursors = self._cursors.load(epochs) if epochs else []
        self._groups = [_Group(cursor, cursor) for cursor in cursors]
        if self._rolls is not None:
            self._rolls.load(cursors, epochs)
        log.info("reading lanes %s", sorted(epochs) or "none")

    def _merge(self) -> None:
        """Make the groups one: read each at the same snapshot, and what follows can be read by one statement."""
        self._await(everything=True)
        pages = []
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            for group in self._groups:
                if group.read.late:
                    return
                pages.append(self._reader.read(group.read, self._rows, durable=False))
        if any(page.cursor.late for page in pages):
            return
        self._reader.make_durable()
        merged = Cursor(
            {lane: hi for page in pages for lane, hi in page.cursor.his.items()},
            pages[0].cursor.snapshot,
        )
        events = [event for page in pages for event in page.events]
        if events:
            self._bus.send(events).wait()
            self._stats.sent += len(events)
            self._note_confirmed(events)
        self._groups = [_Group(merged, merged)]
        self._unstored.update(merged.his)

    def _adapt(self, page: Page) -> None:
        size = sum(map(len, map(_BODY, page.events)))
        if size > self._most_bytes:
            self._rows = max(self._rows // 2, 1)
        elif not page.complete and size < self._most_bytes // 2:
            self._rows = min(self._rows * 2, self._most_rows)
