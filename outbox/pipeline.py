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
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from random import Random
from typing import Final

from outbox.buses.base import Bus, Confirmation, OutgoingMessage
from outbox.crash_points import crash_point
from outbox.cursors import CursorStore
from outbox.errors import BusError, LeaseLost
from outbox.handed_over import Records, records_of
from outbox.reader import Cursor, LogReader, Page
from outbox.roll_caller import RollCaller

log = logging.getLogger(__name__)

_STORE_EVERY: Final = 0.1
_FIRST_ROWS: Final = 16
_AT_ONCE: Final = float("inf")
_BODY: Final = attrgetter("body")


@dataclass
class RelayStats:
    """What a relay has done since it started."""

    sent: int = 0
    confirmed: int = 0
    failures: int = 0
    """Batches that the broker did not confirm, and lost database connections."""
    refusals: int = 0
    """Batches that the broker did not confirm since it last did."""

    def __post_init__(self) -> None:
        self._refused_since = 0.0  # by the monotonic clock, so nothing to be printed

    def refuse(self) -> None:
        """The broker did not confirm."""
        if not self.refusals:
            self._refused_since = time.monotonic()
        self.failures += 1
        self.refusals += 1

    def forgive(self) -> None:
        """It has confirmed again, or may have another try."""
        self.refusals = 0

    def refused_for(self) -> float:
        """For how many seconds the broker has confirmed nothing of what it was given."""
        return time.monotonic() - self._refused_since if self.refusals else 0.0


@dataclass
class _Group:
    """Lanes that are read by one statement, and how far they are confirmed."""

    read: Cursor
    confirmed: Cursor
    drained: bool = False
    """Whether the last page was everything that there was."""


@dataclass(slots=True)
class _Sent:
    """What is kept of a page that was sent. The events are let go: what fails is read again."""

    group: _Group
    cursor: Cursor
    events: int
    records: Records


@dataclass(slots=True)
class _InFlight:
    """A page of a group of lanes, or rolls."""

    confirmation: Confirmation
    sent: _Sent | list[OutgoingMessage]


class Pipeline:
    """The pages of the lanes that one relay holds."""

    def __init__(
        self,
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

        *page_rows*: fresh events read at a time, a quarter of them from one lane; fewer while pages are larger than
        *page_bytes*.
        *in_flight*: pages that may wait for the broker's confirmation.
        """
        self.epochs: dict[int, int] = {}
        """The lanes that are read, as they were leased."""
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
        self._most_of_a_lane = max(page_rows // 4, 1)
        self._rows = min(_FIRST_ROWS, self._most_of_a_lane)
        """Fresh events of each lane that a page may have."""
        self._stored_at = 0.0
        self._unstored: set[int] = set()

    def confirmed(self) -> list[Cursor]:
        """How far the lanes are confirmed, where a cursor can say it."""
        return [group.confirmed for group in self._groups if not group.confirmed.late]

    def turn(self) -> bool:
        """Read and send one page of each group; True if there was anything."""
        try:
            groups = self._groups
            pages = [(group, page) for group in groups if (page := self._next_page(group))]
            self._await(everything=not pages)
            if self._groups is not groups:
                return True  # storing has told that the lanes are another relay's
            for group, page in pages:
                self._send_page(group, page)
            if len(groups) > 1:
                self._merge()
        except BusError as error:
            self.begin_again(error)
            return False
        return bool(pages)

    def call(self, rolls: RollCaller) -> None:
        """Send the rolls that are due, behind the pages; they are confirmed in their turn. Raises `BusError`."""
        messages = rolls.messages(self.confirmed(), self.epochs)
        if not messages:
            return
        crash_point("relay.called")
        try:
            self._in_flight.append(_InFlight(self._bus.send(messages), messages))
        except BusError:
            rolls.unsaid(messages)
            raise

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
        for one in self._in_flight:
            if isinstance(one.sent, list) and self._rolls is not None:
                self._rolls.unsaid(one.sent)
        self._in_flight.clear()
        self._reader.forget()
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
        self._stored_at = min(now, time.monotonic())
        crash_point("relay.stored")

    def store_all(self) -> None:
        """Store every lane's cursor, also where nothing has come, once what is under way is confirmed."""
        try:
            self._await(everything=True)
            self._unstored.update(self.epochs)
            self.store()
        except BusError as error:
            self.begin_again(error)

    def finish(self) -> None:
        """Let what is under way be confirmed, and store it."""
        try:
            self._await(everything=True)
            self.store()
        except BusError as error:
            log.warning("%s; left for the next relay", error)

    def _next_page(self, group: _Group) -> Page | None:
        """The page after those that were sent, if there is anything in it."""
        if group.drained and self._reader.unchanged_since(group.read):
            return None
        page = self._reader.read(group.read, self._rows)
        crash_point("relay.read")
        group.read, group.drained = page.cursor, page.complete
        if not page.events:
            if not self._in_flight:
                group.confirmed = page.cursor
            return None
        return page

    def _send_page(self, group: _Group, page: Page) -> None:
        if not self._held():
            raise BusError("this relay was paused for longer than its lease")
        self._adapt(page)
        try:
            self._read_ahead(group, page)
            confirmation = self._bus.send(page.events)
            sent = _Sent(group, page.cursor, len(page.events), records_of(page.events))
        finally:
            self._reader.settle()
        self._stats.sent += sent.events
        crash_point("relay.sent")
        self._in_flight.append(_InFlight(confirmation, sent))

    def _read_ahead(self, group: _Group, page: Page) -> None:
        """Let PostgreSQL make the next page while this one is sent, where there is one and the broker takes them."""
        if not page.complete and len(self._groups) == 1 and not self._stats.refusals:
            self._reader.read_ahead(group.read, self._rows)
            crash_point("relay.asked")

    def _await(self, *, everything: bool) -> None:
        while self._in_flight and (everything or len(self._in_flight) >= self._most_in_flight):
            first = self._in_flight[0]
            first.confirmation.wait()
            crash_point("relay.confirmed")
            self._in_flight.popleft()
            self._stats.forgive()
            if isinstance(first.sent, _Sent):
                sent = first.sent
                sent.group.confirmed = sent.cursor
                self._note_confirmed(sent.events, sent.records)
                self._unstored.update(lane for lane, _ in sent.records)
                self.store(time.monotonic())

    def _note_confirmed(self, events: int, records: Records) -> None:
        self._stats.confirmed += events
        if self._rolls is not None:
            self._rolls.handed_over(events, records)

    def _reload(self, epochs: dict[int, int]) -> None:
        """Go on from the stored cursors: another relay may have moved them."""
        self._in_flight.clear()
        self._reader.forget()
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
        if len(self._groups) < 2:
            return  # storing has told that the lanes are another relay's
        pages = []
        with self._reader.at_one_moment():
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
            self._note_confirmed(len(events), records_of(events))
        self._groups = [_Group(merged, merged)]
        self._unstored.update(merged.his)

    def _adapt(self, page: Page) -> None:
        size = sum(map(len, map(_BODY, page.events)))
        count = len(page.events)
        if size > self._most_bytes or count > self._most_rows:
            self._rows = max(self._rows // 2, 1)
        elif not page.complete and size < self._most_bytes // 2 and count <= self._most_rows // 2:
            self._rows = min(self._rows * 2, self._most_of_a_lane)
