"""A page that PostgreSQL makes while the one before it is sent: that changes when it is read, and nothing else."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine

from outbox.buses.base import OutgoingMessage
from outbox.cursors import CursorStore
from outbox.errors import BusError
from outbox.lanes import Leases
from outbox.pipeline import Pipeline, RelayStats
from outbox.reader import Cursor, LogReader, Page
from tests.integration.test_relay import MemoryBus, conninfo, publish, running, until

ROWS = 3
KEYS = 7


@pytest.fixture
def connect(migrated_engine: Engine) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    opened: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        opened.append(psycopg.connect(conninfo(migrated_engine), autocommit=True))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


Connect = Callable[[], psycopg.Connection[Any]]


def positions(page: Page) -> list[int]:
    return [event.position for event in page.events]


def test_it_is_taken_for_the_cursor_that_it_was_asked_from_and_for_no_other(
    migrated_engine: Engine, connect: Connect
) -> None:
    publish(migrated_engine, *range(100))
    log, plain = LogReader(connect()), LogReader(connect())
    first = log.read(Cursor.at_beginning(range(16)), ROWS)
    log.read_ahead(first.cursor, ROWS)
    publish(migrated_engine, *range(100, 200))
    assert positions(log.read(first.cursor, 100)) == positions(plain.read(first.cursor, ROWS))
    log.read_ahead(first.cursor, ROWS)
    again = Cursor(first.cursor.his, first.cursor.snapshot)
    assert positions(log.read(again, 100)) == positions(plain.read(again, 100))
    log.read_ahead(first.cursor, ROWS)
    assert not log.unchanged_since(Cursor(first.cursor.his))
    log.forget()
    assert positions(log.read(first.cursor, 100)) == positions(plain.read(again, 100))


def test_what_is_read_at_one_moment_was_not_asked_for_before_it(
    migrated_engine: Engine, connect: Connect
) -> None:
    publish(migrated_engine, *range(100))
    log = LogReader(connect())
    first = log.read(Cursor.at_beginning(range(16)), ROWS)
    log.read_ahead(first.cursor, ROWS)
    publish(migrated_engine, 100)
    with log.at_one_moment():
        one = log.read(first.cursor, 100)
        publish(migrated_engine, 101)
        other = log.read(first.cursor, 100)
    assert len(one.events) == len(other.events) == 101 - len(first.events)
    assert one.cursor.snapshot == other.cursor.snapshot


def test_the_server_holds_no_snapshot_for_it_once_it_is_settled(
    migrated_engine: Engine, connect: Connect
) -> None:
    reading, watching = connect(), connect()
    with connect() as filling:
        filling.execute(
            "INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body) "
            "SELECT 0, gen_random_uuid(), 'thing.made', 1, NULL, convert_to(repeat('x', 10000), 'UTF8') "
            "FROM generate_series(1, 3000)"
        )
    log = LogReader(reading)

    def standing() -> tuple[Any, ...] | None:
        return watching.execute(
            "SELECT state, backend_xmin IS NULL FROM pg_stat_activity WHERE pid = %s",
            (reading.info.backend_pid,),
        ).fetchone()

    log.read_ahead(Cursor.at_beginning(range(16)), 5_000)
    until(lambda: standing() == ("active", False))
    log.settle()
    until(lambda: standing() == ("idle", True))


class Slow(MemoryBus):
    """Takes nothing before it is waited for, and remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[OutgoingMessage] = []

    def send(self, batch: Sequence[OutgoingMessage]) -> Any:
        confirmation = super().send(batch)
        self.sent += batch
        return confirmation


class Relaying:
    """A pipeline whose leases are what the test says."""

    def __init__(self, connect: Connect) -> None:
        self.connection = connect()
        leases = Leases(self.connection)
        leases.beat()
        self.held = dict(leases.held)
        self.bus = Slow()
        self.cursors = CursorStore(self.connection)
        self.pipeline = Pipeline(
            LogReader(connect()), self.cursors, self.bus, None, RelayStats(),
            held=lambda: self.held, rest=lambda _: None,
            page_rows=16 * ROWS, page_bytes=1_000_000, in_flight=4,
        )  # fmt: skip
        self.pipeline.follow_leases()

    def turns_until_nothing_moves(self) -> None:
        while self.pipeline.turn():
            pass


def test_it_is_not_sent_once_the_lease_is_gone(migrated_engine: Engine, connect: Connect) -> None:
    publish(migrated_engine, *range(200))
    relay = Relaying(connect)
    relay.pipeline.turn()
    sent = list(relay.bus.sent)
    assert 0 < len(sent) < 200
    held, relay.held = relay.held, {}
    assert not relay.pipeline.turn()
    relay.pipeline.follow_leases()
    assert not relay.pipeline.turn()
    assert relay.bus.sent == sent
    # Another relay had the lanes meanwhile, and has got further than the page that was asked for here.
    theirs = LogReader(connect()).read(Cursor.at_beginning(range(16)), 2 * ROWS).cursor
    epochs = {lane: epoch + 1 for lane, epoch in held.items()}
    relay.connection.execute(
        "INSERT INTO outbox.outbox_lease (lane, epoch, relay_id) "
        "SELECT lane, epoch + 1, relay_id FROM outbox.outbox_lease"
    )
    CursorStore(relay.connection).store(theirs, epochs)
    relay.held = epochs
    relay.pipeline.follow_leases()
    relay.turns_until_nothing_moves()
    after = relay.bus.sent[len(sent) :]
    assert len(after) == 200 - sum(
        event.position <= theirs.his[event.lane] for event in every(connect)
    )
    assert all(event.position > theirs.his[event.lane] for event in after)


def every(connect: Connect) -> list[OutgoingMessage]:
    return LogReader(connect()).read(Cursor.at_beginning(range(16)), 10_000).events


def test_after_a_refusal_what_was_refused_comes_before_it(
    migrated_engine: Engine, connect: Connect
) -> None:
    publish(migrated_engine, *range(200))
    relay = Relaying(connect)
    relay.pipeline.turn()
    relay.pipeline.begin_again(BusError("not now"))
    relay.bus.sent.clear()
    relay.turns_until_nothing_moves()
    assert [event.id for event in relay.bus.sent] == [event.id for event in in_pages(connect)]


def in_pages(connect: Connect) -> Iterator[OutgoingMessage]:
    log, cursor = LogReader(connect()), Cursor.at_beginning(range(16))
    while (page := log.read(cursor, ROWS)).events:
        yield from page.events
        cursor = page.cursor


@pytest.mark.parametrize("seed", range(2))
def test_refusals_at_any_time_lose_nothing_and_keep_the_order_of_a_key(
    migrated_engine: Engine, seed: int
) -> None:
    chance, bus, count = random.Random(seed), MemoryBus(), 3_000
    send, ended = bus.send, threading.Event()

    def moody(batch: Sequence[OutgoingMessage]) -> Any:
        if chance.random() < 0.05:
            bus.refuses = chance.randrange(3)
        return send(batch)

    bus.send = moody  # type: ignore[method-assign]
    for start in range(0, count, 100):
        publish(migrated_engine, *range(start, start + 100))
    with running(migrated_engine, bus, page_rows=32, in_flight=3) as relay:
        relay._stopping.wait = lambda _=None: ended.wait(0)  # type: ignore[method-assign]
        bus.await_numbers(set(range(count)))
        assert relay.stats.failures
    assert sorted(bus.taken) == list(range(count))
    for key in range(KEYS):
        of_key = [number for number in bus.taken if number % KEYS == key]
        assert of_key == sorted(of_key)
