"""The relay: reads what was committed, sends it, and moves its cursor once the broker has it.

Nothing is lost: the stored cursor only ever follows confirmations, in order, a whole page at a time; whatever fails or
dies before that is read and sent again. Nothing is sent that could still vanish: a page is durable before it leaves
(`outbox.reader`). What is sent twice has the same event id, and the inbox drops it.

One thread reads, sends and stores; the broker works on one page while the next is read. A second thread keeps the
leases (`outbox.lanes`), so that a slow broker does not cost the lanes, and stops when the first makes no progress.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any, Final

import psycopg
from sqlalchemy import URL, make_url

from outbox.buses.base import Bus, Confirmation, OutgoingMessage
from outbox.cluster import check_cluster
from outbox.crash_points import crash_point
from outbox.cursors import CursorStore
from outbox.errors import BusError, ConfigurationError, LeaseLost, SchemaError
from outbox.lanes import BEAT_EVERY, TIME_TO_LIVE, Leases
from outbox.partitions import RETENTION, Partitions
from outbox.reader import Cursor, LogReader, Page
from outbox.replies import Replies
from outbox.roll_caller import STANDINGS, RollCaller
from outbox.sql import DEFAULT_SCHEMA, in_schema

log = logging.getLogger(__name__)

_LONGEST_STALL: Final = 60.0
_CHORES_EVERY: Final = 10.0
_STORE_EVERY: Final = 0.1
_LOOK_FOR_REQUESTS_EVERY: Final = 1.0
_LASTED: Final = 10.0


@dataclass(frozen=True)
class RelaySettings:
    """How a relay works. The defaults suit most."""

    page_rows: int = 500
    """Fresh events read of each lane at a time."""
    page_bytes: int = 4_000_000
    """Pages get smaller when they are larger than this."""
    shortest_pause: timedelta = timedelta(milliseconds=2)
    """Pause after an empty read; doubles until `longest_pause`."""
    longest_pause: timedelta = timedelta(milliseconds=250)
    time_to_live: timedelta = TIME_TO_LIVE
    """How long after a relay's death its lanes are taken over."""
    in_flight: int = 2
    """Pages that may wait for the broker's confirmation."""
    retention: timedelta = RETENTION
    rolls: timedelta | None = timedelta(seconds=5)
    """How often subscribers are told what was sent, so that they miss what is lost (`outbox.rolls`); None: never."""
    standings: tuple[timedelta, ...] = STANDINGS
    """After how long that is repeated for a type of which nothing more comes, each time; the last again and again."""
    prepare: bool = True
    """Whether statements may be prepared: False behind a transaction pooler that does not support it."""


@dataclass
class RelayStats:
    """What a relay has done since it started."""

    sent: int = 0
    confirmed: int = 0
    failures: int = 0
    """Batches that the broker did not confirm, and lost database connections."""


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


@dataclass
class _Connections:
    """What lives as long as one database connection does."""

    connection: psycopg.Connection[Any]
    reader: LogReader
    cursors: CursorStore
    partitions: Partitions
    rolls: RollCaller | None
    replies: Replies
    groups: list[_Group] = field(default_factory=list)
    epochs: dict[int, int] = field(default_factory=dict)
    in_flight: deque[_InFlight] = field(default_factory=deque)
    rows: int = 64
    stored_at: float = 0.0
    unstored: set[int] = field(default_factory=set)
    requests_at: float = 0.0


class Relay:
    """One relay process for one log. Any number may run; they share the lanes."""

    def __init__(
        self,
        database_url: str | URL,
        bus: Bus,
        *,
        schema: str = DEFAULT_SCHEMA,
        settings: RelaySettings | None = None,
    ) -> None:
        """Connects when run. *database_url*: as SQLAlchemy's, or a libpq URL."""
        self._conninfo = _conninfo(database_url)
        self._bus = bus
        self._schema = schema
        self._settings = settings or RelaySettings()
        self._stopping = threading.Event()
        self._progress = time.monotonic()
        self._leases: Leases | None = None
        self._finished = threading.Event()
        self._refusals = 0
        """Batches in a row that the broker did not confirm."""
        self.stats = RelayStats()

    def stop(self) -> None:
        """Let `run` end: what is under way is confirmed and stored, and the lanes are given back."""
        self._stopping.set()

    def run(self) -> None:
        """Relay until `stop` is called. Whatever fails is logged and tried again from the stored cursors.

        Raises `ConfigurationError` for what waiting would not mend: no tables (`SchemaError`), another cluster's log,
        an exchange of another kind.
        """
        heart = threading.Thread(target=self._keep_leases, name="outbox leases", daemon=True)
        heart.start()
        random = Random()  # noqa: S311 - jitter
        failures = 0
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    with self._connect() as connection:
                        self._check(connection)
                        self._relay(self._on(connection))
                except ConfigurationError:
                    raise
                except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                    log.warning(
                        "database: %s; connecting again", str(error).strip() or type(error).__name__
                    )
                except Exception:
                    log.exception("unexpected; beginning again with new connections")
                    self._bus.close()
                else:
                    continue
                self.stats.failures += 1
                failures = failures + 1 if time.monotonic() - began < _LASTED else 1
                self._stopping.wait(min(0.1 * 2 ** min(failures, 7), 10) * random.random())
        finally:
            self._stopping.set()
            self._finished.set()
            heart.join(timeout=10)
            self._bus.close()

    # --- the leases' thread

    def _keep_leases(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._connect() as connection:
                    leases = Leases(connection, self._schema, self._settings.time_to_live)
                    self._beat_until_stopped(leases)
            except psycopg.Error as error:
                self._leases = None
                log.warning("leases: %s", str(error).strip() or type(error).__name__)
                self._stopping.wait(0.5)
            except Exception:
                # A relay without this thread would hold no lane and say nothing.
                self._leases = None
                log.exception("leases: unexpected; beginning again")
                self._stopping.wait(0.5)

    def _beat_until_stopped(self, leases: Leases) -> None:
        while not self._stopping.is_set():
            if time.monotonic() - self._progress > _LONGEST_STALL:
                log.error(
                    "no progress for %.0f s: leaving the lanes to other relays", _LONGEST_STALL
                )
                self._leases = None
            else:
                leases.beat()
                self._leases = leases
            self._stopping.wait(BEAT_EVERY.total_seconds())
        self._finished.wait(20)
        leases.release()
        self._leases = None

    def _held(self) -> dict[int, int]:
        leases = self._leases
        return dict(leases.held) if leases is not None and leases.trusted() else {}

    # --- the relaying thread

    def _relay(self, at: _Connections) -> None:
        pause = self._settings.shortest_pause.total_seconds()
        chores_at = 0.0
        while not self._stopping.is_set():
            self._follow_leases(at)
            moved = self._turn(at)
            now = time.monotonic()
            self._progress = now
            moved |= self._prove(at, now)
            if moved:
                pause = self._settings.shortest_pause.total_seconds()
                continue
            self._store(at, now)
            self._bus.keep_alive()
            if now - chores_at > _CHORES_EVERY:
                chores_at = now
                self._do_chores(at)
            self._stopping.wait(pause)
            pause = min(pause * 2, self._settings.longest_pause.total_seconds())
        self._finish(at)

    def _prove(self, at: _Connections, now: float) -> bool:
        """Tell subscribers what was sent, and send again what they miss; True if there is more to do at once."""
        try:
            self._call_rolls(at)
            if now < at.requests_at or not at.epochs:
                return False
            answered = at.replies.answer_one()
        except BusError as error:
            self._begin_again(at, error)
            return False
        if not answered:
            at.requests_at = now + _LOOK_FOR_REQUESTS_EVERY
        return answered

    def _call_rolls(self, at: _Connections) -> None:
        if at.rolls is None or not self._held():
            return
        confirmed = [group.confirmed for group in at.groups if not group.confirmed.late]
        messages = at.rolls.messages(confirmed, at.epochs)
        if not messages:
            return
        crash_point("relay.called")
        try:
            self._bus.send(messages).wait()
        except BusError:
            at.rolls.unsaid(messages)
            raise

    def _do_chores(self, at: _Connections) -> None:
        # Lanes without events get a recent snapshot too: a takeover, or a drop, then has little to look through.
        at.unstored.update(at.epochs)
        self._store(at, float("inf"))
        if 0 in at.epochs:
            at.partitions.maintain()
            at.cursors.rotate()
            if at.rolls is not None:
                at.rolls.tidy(self._settings.retention)

    def _finish(self, at: _Connections) -> None:
        try:
            self._await(at, everything=True)
            self._store(at, float("inf"))
        except BusError as error:
            log.warning("%s; left for the next relay", error)

    def _turn(self, at: _Connections) -> bool:
        """Read and send one page of each group; True if there was anything."""
        try:
            moved = False
            for group in list(at.groups):
                moved |= self._send_page(at, group)
            if len(at.groups) > 1:
                self._merge(at)
            self._await(at, everything=not moved)
        except BusError as error:
            self._begin_again(at, error)
            return False
        return moved

    def _send_page(self, at: _Connections, group: _Group) -> bool:
        if group.drained and at.reader.unchanged_since(group.read):
            return False
        page = at.reader.read(group.read, at.rows)
        crash_point("relay.read")
        group.read, group.drained = page.cursor, page.complete
        if not page.events:
            if not at.in_flight:
                group.confirmed = page.cursor
            return False
        if not self._held():
            raise BusError("this relay was paused for longer than its lease")
        confirmation = self._bus.send([_outgoing(event) for event in page.events])
        self.stats.sent += len(page.events)
        crash_point("relay.sent")
        at.in_flight.append(_InFlight(confirmation, group, page))
        self._adapt(at, page)
        return True

    def _await(self, at: _Connections, *, everything: bool) -> None:
        while at.in_flight and (everything or len(at.in_flight) >= self._settings.in_flight):
            sent = at.in_flight[0]
            sent.confirmation.wait()
            crash_point("relay.confirmed")
            at.in_flight.popleft()
            self._refusals = 0
            sent.group.confirmed = sent.page.cursor
            self._confirmed(at, len(sent.page.events))
            at.unstored.update(event.lane for event in sent.page.events)
            self._store(at, time.monotonic())

    def _confirmed(self, at: _Connections, events: int) -> None:
        self.stats.confirmed += events
        if at.rolls is not None:
            at.rolls.handed_over(events)

    def _store(self, at: _Connections, now: float) -> None:
        if not at.unstored or now - at.stored_at < _STORE_EVERY:
            return
        if any(group.confirmed.late for group in at.groups):
            return  # within a huge late transaction there is no snapshot that says what was delivered
        for group in at.groups:
            his = {lane: hi for lane, hi in group.confirmed.his.items() if lane in at.unstored}
            try:
                at.cursors.store(Cursor(his, group.confirmed.snapshot), at.epochs)
            except LeaseLost as error:
                log.info("%s", error)
                self._reload(at, {})
                return
        at.unstored.clear()
        at.stored_at = now
        crash_point("relay.stored")

    def _begin_again(self, at: _Connections, error: BusError) -> None:
        """The broker did not confirm: everything after the last confirmation is read and sent again."""
        self.stats.failures += 1
        self._refusals += 1
        log.warning("%s; sending again", error)
        at.in_flight.clear()
        for group in at.groups:
            group.read, group.drained = group.confirmed, False
        self._stopping.wait(min(0.2 * 2 ** min(self._refusals, 5), 5) * Random().random())  # noqa: S311

    # --- lanes that come and go

    def _follow_leases(self, at: _Connections) -> None:
        held = self._held()
        if held == at.epochs:
            return
        try:
            self._await(at, everything=True)
            self._store(at, float("inf"))
        except BusError as error:
            self._begin_again(at, error)
        self._reload(at, self._held())

    def _reload(self, at: _Connections, epochs: dict[int, int]) -> None:
        """Go on from the stored cursors: another relay may have moved them."""
        at.in_flight.clear()
        at.unstored.clear()
        at.epochs = epochs
        cursors = at.cursors.load(epochs) if epochs else []
        at.groups = [_Group(cursor, cursor) for cursor in cursors]
        if at.rolls is not None:
            at.rolls.load(cursors, epochs)
        log.info("reading lanes %s", sorted(epochs) or "none")

    def _merge(self, at: _Connections) -> None:
        """Make the groups one: read each at the same snapshot, and what follows can be read by one statement."""
        self._await(at, everything=True)
        pages = []
        with at.connection.transaction():
            at.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            for group in at.groups:
                if group.read.late:
                    return
                pages.append(at.reader.read(group.read, at.rows, durable=False))
        if any(page.cursor.late for page in pages):
            return
        at.reader.make_durable()
        merged = Cursor(
            {lane: hi for page in pages for lane, hi in page.cursor.his.items()},
            pages[0].cursor.snapshot,
        )
        events = [event for page in pages for event in page.events]
        if events:
            self._bus.send([_outgoing(event) for event in events]).wait()
            self.stats.sent += len(events)
            self._confirmed(at, len(events))
        at.groups = [_Group(merged, merged)]
        at.unstored.update(merged.his)

    def _adapt(self, at: _Connections, page: Page) -> None:
        size = sum(len(event.body) for event in page.events)
        if size > self._settings.page_bytes:
            at.rows = max(at.rows // 2, 1)
        elif not page.complete and size < self._settings.page_bytes // 2:
            at.rows = min(at.rows * 2, self._settings.page_rows)

    # --- connections

    def _check(self, connection: psycopg.Connection[Any]) -> None:
        there = in_schema("SELECT to_regclass('{schema}.outbox_cursor')", self._schema).encode()
        if connection.execute(there).fetchone() == (None,):
            raise SchemaError(
                f"schema {self._schema!r} has no tables of 'outbox': run `outbox migrate --schema {self._schema}`"
            )
        check_cluster(connection, self._schema)

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(
            self._conninfo,
            autocommit=True,
            connect_timeout=10,
            prepare_threshold=5 if self._settings.prepare else None,
            application_name="outbox relay",
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=30_000,
        )

    def _on(self, connection: psycopg.Connection[Any]) -> _Connections:
        every = self._settings.rolls
        return _Connections(
            connection,
            LogReader(connection, self._schema, prepare=self._settings.prepare),
            CursorStore(connection, self._schema),
            Partitions(connection, self._schema, retention=self._settings.retention),
            None
            if every is None
            else RollCaller(
                connection, self._schema, every=every, standings=self._settings.standings
            ),
            Replies(connection, self._bus, self._schema),
        )


def _outgoing(event: Any) -> OutgoingMessage:
    return OutgoingMessage(
        event.event_id, event.type, event.key, event.body, event.lane, event.position, event.key_seq
    )


def _conninfo(database_url: str | URL) -> str:
    try:
        url = make_url(database_url)
    except Exception as error:
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql://user@host/name"
        ) from error
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
