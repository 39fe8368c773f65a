"""What a transaction that holds the xmin horizon does to readers and relays: nothing that is dead is cleared away.

Each log has a schema of its own, so that what lies in one is not in the way of another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import count
from typing import Any

import psycopg
from sqlalchemy import URL, create_engine

from bench.figures import Figure, Measured, Timer
from bench.publishing import FILL, conninfo
from outbox.buses import Topology
from outbox.buses.base import OutgoingMessage
from outbox.partitions import SIZE, Partitions
from outbox.reader import Cursor, LogReader
from outbox.relay import Relay
from outbox.schema import upgrade_engine
from outbox.snapshot import Snapshot
from outbox.sql import in_schema

LANES = range(16)
READ, DRAINED = 20_000, 50_000
STRAGGLED_BEHIND = 1_000_000
PAGES, FRESH = 20, 160
LOAD = 2_000
"""Events in a second while the horizon is held."""

QUEUE = """
CREATE TABLE IF NOT EXISTS bench_queue (id bigserial PRIMARY KEY, event_id uuid, type text, key text, body bytea)
"""
FILL_QUEUE = """
INSERT INTO bench_queue (event_id, type, key, body)
SELECT gen_random_uuid(), 'order.created', i::text,
    convert_to('{"id":' || i || ',"x":"' || repeat('y', 260) || '"}', 'UTF8')
FROM generate_series(1, %s) AS i
"""
INSERT_LATE = """
INSERT INTO {schema}.outbox_event (position, lane, event_id, type, version, body)
VALUES (%s, 0, gen_random_uuid(), 'order.created', 1, '')
"""
# Its best form: what `id IN (SELECT ... LIMIT ...)` locks may be looked for again for each row.
TAKE = """
DELETE FROM bench_queue
WHERE id = ANY(ARRAY(SELECT id FROM bench_queue ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED))
RETURNING event_id, type, key, body
"""


NAMES = ("a page after a late commit", "read the log with", "relay after the horizon")
"""What the names of its figures begin with."""


@contextmanager
def figures(database: URL, behind: int, minutes: float) -> Iterator[list[Figure]]:
    """The figures; the horizon is held from when the first of them is measured."""
    with ExitStack() as stack:
        horizon = _Horizon(database, stack)
        plans = ("custom", "generic")
        yield [
            _late_commit(horizon, plan) for plan in plans
        ] + [
            Figure(
                f"read the log with {behind:,} events behind, horizon held", "events/s",
                _reading(horizon, "bench_behind", behind), _reading(horizon, "bench_empty", 0),
                "nothing behind", floor=0.95, reach=0.98,
            ),
            _relays(horizon, minutes),
        ]  # fmt: skip


class _Horizon:
    """Holds it, and has the logs made behind it."""

    def __init__(self, database: URL, stack: ExitStack) -> None:
        self.database = database
        self.stack = stack
        self._logs: dict[str, _Log] = {}

    @cached_property
    def held(self) -> psycopg.Connection[Any]:
        connection = self.stack.enter_context(psycopg.connect(conninfo(self.database)))
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT pg_current_xact_id()")
        return connection

    def log(self, schema: str, behind: int) -> _Log:
        """The log in *schema* with so many delivered events, made when it is first asked for."""
        assert not self.held.closed
        if schema not in self._logs:
            self._logs[schema] = _Log(self, schema, behind)
        return self._logs[schema]


class _Log:
    def __init__(self, horizon: _Horizon, schema: str, behind: int) -> None:
        self.schema = schema
        upgrade_engine(create_engine(horizon.database), schema=schema)
        self.connection = horizon.stack.enter_context(
            psycopg.connect(conninfo(horizon.database), autocommit=True)
        )
        horizon.stack.callback(self.connection.execute, f"DROP SCHEMA {schema} CASCADE".encode())
        # The first positions are left to stragglers.
        self.run("SELECT setval('{schema}.outbox_event_position', 100000)")
        partitions = Partitions(self.connection, schema)
        for start in range(0, behind, SIZE):
            partitions.maintain()
            self.fill(min(SIZE, behind - start))
        partitions.maintain()
        self.run("ANALYZE {schema}.outbox_event")

    def run(self, sql: str, *values: Any) -> psycopg.Cursor[Any]:
        """Execute *sql* with its `{schema}`."""
        return self.connection.execute(in_schema(sql, self.schema).encode(), values or None)

    def fill(self, events: int) -> None:
        """Commit so many events."""
        self.run(FILL.replace("outbox.", "{schema}."), events)

    def cursor_at_the_end(self) -> Cursor:
        """Everything that is there has been delivered."""
        top = self.run("SELECT lane, max(position) FROM {schema}.outbox_event GROUP BY lane")
        his = dict.fromkeys(LANES, 0) | dict(top.fetchall())
        ((snapshot,),) = self.run("SELECT pg_current_snapshot()::text").fetchall()
        return Cursor(his, Snapshot(snapshot))


def _reading(horizon: _Horizon, schema: str, behind: int) -> Measured:
    def read(timer: Timer) -> None:
        log = horizon.log(schema, behind)
        if not behind:
            log.run("TRUNCATE {schema}.outbox_event")
        cursor = log.cursor_at_the_end()
        log.fill(READ)
        if not behind:
            log.run("ANALYZE {schema}.outbox_event")
        reader = LogReader(log.connection, schema)
        with timer.counting(READ):
            while not (page := reader.read(cursor, 500)).complete:
                cursor = page.cursor

    return read


def _late_commit(horizon: _Horizon, plan: str) -> Figure:
    """A page in which one event comes late, numbered before a million delivered ones, beside a page without."""
    positions = count(1 if plan == "custom" else PAGES * 1_000)

    def reading(is_late: bool) -> Measured:
        def read(timer: Timer) -> None:
            log = horizon.log("bench_late", STRAGGLED_BEHIND)
            info = conninfo(horizon.database)
            with psycopg.connect(info, autocommit=True) as ours, psycopg.connect(info) as late:
                ours.execute(f"SET plan_cache_mode = force_{plan}_plan".encode())
                reader, cursor = LogReader(ours, log.schema), log.cursor_at_the_end()
                for _ in range(PAGES):
                    if is_late:
                        late.execute(
                            in_schema(INSERT_LATE, log.schema).encode(), (next(positions),)
                        )
                    log.fill(1)
                    cursor = reader.read(cursor, 500).cursor
                    late.commit()
                    log.fill(FRESH)
                    with timer.counting(1):
                        page = reader.read(cursor, 500)
                    assert len(page.events) == FRESH + is_late
                    cursor = page.cursor

        return read

    return Figure(
        f"a page after a late commit behind {STRAGGLED_BEHIND:,} events, {plan} plan", "ms",
        reading(is_late=True), reading(is_late=False), "no late commit", ceiling=1.5, reach=1.2,
    )  # fmt: skip


class _NullBus:
    """Confirms whatever it is given, and stops its relay when that has nothing more to do."""

    def __init__(self) -> None:
        self.relay: Relay | None = None
        self.unrouted: Mapping[str, int] = {}
        self.until = 0

    def declare(self, topology: Topology) -> None: ...

    def send(self, _: Sequence[OutgoingMessage]) -> _NullBus:
        return self

    def wait(self) -> None: ...

    def keep_alive(self) -> None:
        if self.relay is not None and self.relay.stats.confirmed >= self.until:
            self.relay.stop()

    def close(self) -> None: ...


def _relays(horizon: _Horizon, minutes: float) -> Figure:
    """Our relay beside one that takes with SKIP LOCKED and DELETE, after both had the same load for so long."""

    def aged() -> _Log:
        log = horizon.log("bench_held", 0)
        if not hasattr(horizon, "has_aged"):
            horizon.has_aged = True  # type: ignore[attr-defined]
            _load(horizon, log, minutes * 60)
        return log

    def ours(timer: Timer) -> None:
        log = aged()
        log.fill(DRAINED)
        bus = _NullBus()
        bus.relay, bus.until = Relay(horizon.database, bus, schema=log.schema), DRAINED
        with timer.counting(DRAINED):
            bus.relay.run()

    def control(timer: Timer) -> None:
        log = aged()
        log.run(FILL_QUEUE, DRAINED)
        began, taken = time.monotonic(), 0
        timed = Timer()
        with timed.counting(0):
            while taken < DRAINED and time.monotonic() - began < 10:
                taken += len(log.run(TAKE).fetchall())
        timer.seconds, timer.work = timed.seconds, max(taken, 1)

    return Figure(
        f"relay after the horizon was held for {minutes:g} min under load, null bus", "events/s",
        ours, control, "SKIP LOCKED, DELETE", floor=5, reach=20,
    )  # fmt: skip


def _load(horizon: _Horizon, log: _Log, seconds: float) -> None:
    """Commit events and have both relays carry them."""
    over = threading.Event()
    relay = Relay(horizon.database, _NullBus(), schema=log.schema)

    def take() -> None:
        with psycopg.connect(conninfo(horizon.database), autocommit=True) as connection:
            while not over.is_set():
                if not connection.execute(TAKE.encode()).fetchall():
                    over.wait(0.01)

    log.run(QUEUE)
    horizon.stack.callback(log.run, "DROP TABLE bench_queue")
    threads = [threading.Thread(target=each) for each in (relay.run, take)]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        second = time.monotonic()
        log.fill(LOAD)
        log.run(FILL_QUEUE, LOAD)
        over.wait(max(0.0, 1 - (time.monotonic() - second)))
    relay.stop()
    over.set()
    for thread in threads:
        thread.join()
