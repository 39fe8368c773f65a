"""The relay: reads what was committed, sends it, and moves its cursor once the broker has it.

Nothing is lost: the stored cursor only ever follows confirmations (`outbox.pipeline`). Nothing is sent that could still
vanish: a page is durable before it leaves (`outbox.reader`). What is sent twice has the same event id, and the inbox
drops it.

One thread reads, sends and stores; the broker works on one page while the next is read. A second one keeps the lanes
(`outbox.lease_keeper`), a third listens for those who publish (`outbox.listening`).
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any, Final

import psycopg
from psycopg import errors
from sqlalchemy import URL, make_url

from outbox.bell import Bell
from outbox.buses.base import Bus
from outbox.cluster import check_cluster
from outbox.cursors import CursorStore
from outbox.errors import BusError, ConfigurationError, SchemaError, told
from outbox.lanes import TIME_TO_LIVE
from outbox.lease_keeper import LeaseKeeper
from outbox.listening import listening
from outbox.partitions import RETENTION, Partitions
from outbox.pauses import Pauses
from outbox.pipeline import Pipeline, RelayStats
from outbox.pooler import is_pooled, prepare_nothing_if_pooled
from outbox.reader import LogReader
from outbox.replies import Replies
from outbox.roll_caller import STANDINGS, RollCaller
from outbox.snapshot import SERVER
from outbox.sql import DEFAULT_SCHEMA, in_schema

log = logging.getLogger(__name__)

_CHORES_EVERY: Final = 10.0
_LOOK_FOR_REQUESTS_EVERY: Final = 1.0
_LASTED: Final = 10.0
_DATABASE_ERRORS: Final = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    errors.IdleInTransactionSessionTimeout,  # this process was paused, and held locks
)


@dataclass(frozen=True)
class RelaySettings:
    """How a relay works. The defaults suit most."""

    page_rows: int = 512
    """Fresh events read at a time, a quarter of them from one lane."""
    page_bytes: int = 4_000_000
    """Pages get smaller when they are larger than this."""
    shortest_pause: timedelta = timedelta(milliseconds=2)
    """Pause after an empty read, at first: then a quarter of the time for which there was nothing, until
    `longest_pause`. So an event waits for a fraction of the time that went by since the one before it."""
    longest_pause: timedelta = timedelta(milliseconds=250)
    longest_pause_if_rung: timedelta = timedelta(seconds=1)
    """The longest pause while all that is found was rung for (`outbox.pauses`)."""
    listen: bool = True
    """Whether whoever publishes can end a pause (`outbox.doorbell`), unless a pooler stands between."""
    time_to_live: timedelta = TIME_TO_LIVE
    """How long after a relay's death its lanes are taken over."""
    longest_refusal: timedelta = timedelta(seconds=15)
    """After so long without one confirmation from the broker the lanes are left to other relays, where any live."""
    in_flight: int = 16
    """Pages that may wait for the broker's confirmation."""
    retention: timedelta = RETENTION
    rolls: timedelta | None = timedelta(seconds=5)
    """How often subscribers are told what was sent, so that they miss what is lost (`outbox.rolls`); None: never."""
    standings: tuple[timedelta, ...] = STANDINGS
    """After how long that is repeated for a type of which nothing more comes, each time; the last again and again."""
    prepare: bool | None = None
    """Whether statements are prepared; None: unless a pooler stands between (`outbox.pooler`)."""


@dataclass
class _Connected:
    """What lives as long as one database connection does."""

    pipeline: Pipeline
    partitions: Partitions
    cursors: CursorStore
    rolls: RollCaller | None
    replies: Replies
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
        self._bell = Bell()
        """Rung to end a pause."""
        self.stats = RelayStats()
        self._keeper = LeaseKeeper(
            self._connect, schema, stats=self.stats, changed=self._bell.ring,
            time_to_live=self._settings.time_to_live, longest_refusal=self._settings.longest_refusal,
        )  # fmt: skip

    def stop(self) -> None:
        """Let `run` end: what is under way is confirmed and stored, and the lanes are given back."""
        self._stopping.set()
        self._keeper.stop()
        self._bell.ring()

    def run(self) -> None:
        """Relay until `stop` is called. Whatever fails is logged and tried again from the stored cursors.

        Raises `ConfigurationError` for what waiting would not mend: no tables (`SchemaError`), another cluster's log,
        an exchange of another kind.
        """
        self._keeper.start()
        random = Random()  # noqa: S311 - jitter
        failures = 0
        ears = ExitStack()
        if self._settings.listen:
            ears.enter_context(listening(self._connect, self._schema, self._bell))
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    with self._connect() as connection, self._connect_to_read() as reading:
                        server = self._check(connection)
                        self._relay(self._on(connection, reading, server))
                except ConfigurationError:
                    raise
                except _DATABASE_ERRORS as error:
                    log.warning("database: %s; connecting again", told(error))
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
            self._keeper.finish()
            ears.close()
            self._bus.close()

    def _held(self) -> dict[int, int]:
        return self._keeper.held()

    # --- the relaying thread

    def _relay(self, at: _Connected) -> None:
        chores_at = 0.0
        pauses = self._pauses()
        while not self._stopping.is_set():
            at.pipeline.follow_leases()
            moved = at.pipeline.turn()
            now = time.monotonic()
            self._keeper.note_progress(now)
            if moved:
                pauses.found(now)
            if not pauses.has_no_time(now):
                if self._prove(at, now):
                    pauses.found(now)
                    moved = True
                # Also under load that never ends: the log would outgrow its partitions.
                if now - chores_at > _CHORES_EVERY:
                    chores_at = now
                    self._do_chores(at)
                if not moved:
                    at.pipeline.store(now)
            if moved:
                continue
            self._bus.keep_alive()
            if self._bell.wait(pauses.next(now)):
                pauses.rung(time.monotonic())
        at.pipeline.finish()

    def _pauses(self) -> Pauses:
        settings = self._settings
        limits = settings.shortest_pause, settings.longest_pause, settings.longest_pause_if_rung
        shortest, longest, if_rung = (limit.total_seconds() for limit in limits)
        return Pauses(shortest, longest, if_rung if settings.listen else longest, time.monotonic())

    def _prove(self, at: _Connected, now: float) -> bool:
        """Tell subscribers what was sent, and send again what they miss; True if there is more to do at once."""
        try:
            if at.rolls is not None and self._held():
                at.pipeline.call(at.rolls)
            if now < at.requests_at or not at.pipeline.epochs:
                return False
            answered = at.replies.answer_one()
        except BusError as error:
            at.pipeline.begin_again(error)
            return False
        if not answered:
            at.requests_at = now + _LOOK_FOR_REQUESTS_EVERY
        return answered

    def _do_chores(self, at: _Connected) -> None:
        # Lanes without events get a recent snapshot too: a takeover, or a drop, then has little to look through.
        at.pipeline.store_all()
        if 0 in at.pipeline.epochs:
            at.partitions.maintain()
            at.cursors.rotate()
            if at.rolls is not None:
                at.rolls.tidy(self._settings.retention)

    # --- connections

    def _check(self, connection: psycopg.Connection[Any]) -> str:
        """Raise unless the log is there, and ours; which server has it."""
        there = in_schema("SELECT to_regclass('{schema}.outbox_cursor')", self._schema).encode()
        if connection.execute(there).fetchone() == (None,):
            raise SchemaError(
                f"schema {self._schema!r} has no tables of 'outbox': run `outbox migrate --schema {self._schema}`"
            )
        check_cluster(connection, self._schema)
        ((server,),) = connection.execute(f"SELECT {SERVER}".encode()).fetchall()
        return str(server)

    def _connect(self) -> psycopg.Connection[Any]:
        connection = psycopg.connect(
            self._conninfo,
            autocommit=True,
            connect_timeout=10,
            prepare_threshold=None if self._settings.prepare is False else 5,
            application_name="outbox relay",
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=30_000,
        )
        if self._settings.prepare is None:
            prepare_nothing_if_pooled(connection)
        return connection

    def _connect_to_read(self) -> psycopg.Connection[Any]:
        connection = self._connect()
        if connection.prepare_threshold is not None and not is_pooled(connection):
            # Planning for the values of each page takes twice as long as a small page, and finds the same plan.
            connection.execute("SET plan_cache_mode = force_generic_plan")
        return connection

    def _on(
        self,
        connection: psycopg.Connection[Any],
        reading: psycopg.Connection[Any],
        server: str,
    ) -> _Connected:
        settings = self._settings
        cursors = CursorStore(connection, self._schema, server=server)
        rolls = (
            None
            if settings.rolls is None
            else RollCaller(
                connection,
                self._schema,
                every=settings.rolls,
                standings=settings.standings,
                server=server,
            )
        )
        pipeline = Pipeline(
            LogReader(reading, self._schema, server=server),
            cursors,
            self._bus,
            rolls,
            self.stats,
            held=self._held,
            rest=self._stopping.wait,
            page_rows=settings.page_rows,
            page_bytes=settings.page_bytes,
            in_flight=settings.in_flight,
        )
        return _Connected(
            pipeline,
            Partitions(connection, self._schema, retention=settings.retention),
            cursors,
            rolls,
            Replies(connection, self._bus, self._schema),
        )


def _conninfo(database_url: str | URL) -> str:
    try:
        url = make_url(database_url)
    except Exception as error:
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql://user@host/name"
        ) from error
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
