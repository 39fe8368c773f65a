"""The snapshot cursor delivers every committed event exactly once and in the order of its key, whatever interleaves."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import Engine, make_url

from outbox.reader import Cursor, LogReader, Page
from outbox.snapshot import SERVER, Snapshot
from tests.workers import eventually

ALL_ARMS = ("fresh", "ended", "begun")
INSERT = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body) VALUES (%s, %s, 'thing.made', 1, %s, %s)
"""
Connect = Callable[[], psycopg.Connection[Any]]


@pytest.fixture
def connect(migrated_engine: Engine) -> Iterator[Connect]:
    url = (
        make_url(migrated_engine.url)
        .set(drivername="postgresql")
        .render_as_string(hide_password=False)
    )
    opened: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        opened.append(psycopg.connect(url))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def reader(connect: Connect, arms: tuple[str, ...] = ALL_ARMS) -> LogReader:
    connection = connect()
    connection.autocommit = True
    return LogReader(connection, arms=arms)


def insert(connection: psycopg.Connection[Any], body: str, lane: int = 0) -> None:
    connection.execute(INSERT, (lane, uuid4(), None, body.encode()))


def bodies(page: Page) -> list[str]:
    return [event.body.decode() for event in page.events]


def drain(log: LogReader, cursor: Cursor, rows: int = 100) -> tuple[list[str], Cursor]:
    found: list[str] = []
    while True:
        page = log.read(cursor, rows)
        found += bodies(page)
        cursor = page.cursor
        if page.complete:
            return found, cursor


@contextmanager
def _one_that_was_running(connect: Connect, log: LogReader) -> Iterator[list[str]]:
    """Numbered first, running when later ones are read: its xid is in the snapshot's list."""
    late, early = connect(), connect()
    insert(late, "late")
    insert(early, "early")
    early.commit()
    found, cursor = drain(log, Cursor.at_beginning(range(16)))
    assert found == ["early"]
    late.commit()
    yield drain(log, cursor)[0]


@contextmanager
def _one_above_the_snapshot(connect: Connect, log: LogReader) -> Iterator[list[str]]:
    """Its xid is above the newest that has ended, hence above the snapshot's xmax, though its position is below."""
    early, late = connect(), connect()
    cursor, xid = Cursor.at_beginning(range(16)), 0
    while xid < cursor.snapshot.next:
        late.rollback()  # another test's transaction began after it, and has ended
        early.execute("SELECT pg_current_xact_id()")
        insert(late, "late")
        insert(early, "early")
        early.commit()
        found, cursor = drain(log, cursor)
        assert found == ["early"]
        (xid,) = late.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() or (0,)
    late.commit()
    yield drain(log, cursor)[0]


STRAGGLERS = {"ended": _one_that_was_running, "begun": _one_above_the_snapshot}


@pytest.mark.parametrize("staged", STRAGGLERS.values(), ids=STRAGGLERS.keys())
def test_event_of_a_late_commit_is_not_skipped(connect: Connect, staged: Any) -> None:
    with staged(connect, reader(connect)) as found:
        assert found == ["late"]


def test_event_of_a_late_commit_is_not_skipped_in_a_lane_that_goes_on_with_the_others(
    connect: Connect,
) -> None:
    log, late, early = reader(connect), connect(), connect()
    insert(late, "late", lane=3)
    insert(early, "early", lane=0)
    early.commit()
    found, cursor = drain(log, Cursor.at_beginning(range(16)))
    assert (found, len(set(cursor.his.values()))) == (["early"], 1)
    late.commit()
    insert(early, "next", lane=3)
    early.commit()
    assert drain(log, cursor)[0] == ["late", "next"]


def test_a_lane_far_behind_the_others_is_read_to_its_end(connect: Connect) -> None:
    log, writer = reader(connect), connect()
    for position, lane in ((1, 0), (2, 1), (7_000_000, 1), (7_000_001, 0), (9_000_000, 0)):
        writer.execute("SELECT setval('outbox.outbox_event_position', %s, false)", (position,))
        insert(writer, str(position), lane)
    writer.commit()
    found, cursor = drain(log, Cursor.at_beginning(range(16)), rows=1)
    assert found == ["1", "2", "7000000", "7000001", "9000000"]
    assert set(cursor.his.values()) == {9_000_000}


@pytest.mark.parametrize("arm", STRAGGLERS)
def test_without_its_arm_the_event_of_a_late_commit_would_be_lost(
    connect: Connect, arm: str
) -> None:
    mutant = reader(connect, tuple(one for one in ALL_ARMS if one != arm))
    with STRAGGLERS[arm](connect, mutant) as found:
        assert found == []


def test_without_the_fresh_arm_nothing_is_found_at_all(connect: Connect) -> None:
    with connect() as writer:
        insert(writer, "a")
    assert drain(reader(connect, ("ended", "begun")), Cursor.at_beginning(range(16)))[0] == []


def test_a_writer_idle_in_another_database_of_the_cluster_holds_nobody_up(
    connect: Connect, make_database: Callable[[], str]
) -> None:
    elsewhere = (
        make_url(make_database()).set(drivername="postgresql").render_as_string(hide_password=False)
    )
    with psycopg.connect(elsewhere) as idle:
        idle.execute("CREATE TABLE t (i integer)")
        with connect() as writer:
            insert(writer, "a")
        assert drain(reader(connect), Cursor.at_beginning(range(16)))[0] == ["a"]


def test_an_event_rolled_back_to_a_savepoint_is_not_delivered_and_its_neighbours_are(
    connect: Connect,
) -> None:
    with connect() as writer:
        insert(writer, "before")
        writer.execute("SAVEPOINT a")
        insert(writer, "undone")
        writer.execute("ROLLBACK TO SAVEPOINT a")
        writer.execute("SAVEPOINT b")
        insert(writer, "after")
        writer.execute("RELEASE SAVEPOINT b")
    assert drain(reader(connect), Cursor.at_beginning(range(16)))[0] == ["before", "after"]


def test_an_unchanged_cluster_is_noticed_without_reading(connect: Connect) -> None:
    log = reader(connect)
    cursor = Cursor.at_beginning(range(16))

    def unchanged() -> bool:
        nonlocal cursor
        _, cursor = drain(log, cursor)
        return log.unchanged_since(cursor)

    # Other tests write to the same cluster.
    eventually(unchanged)
    with connect() as writer:
        insert(writer, "a")
    assert not log.unchanged_since(cursor)


def test_the_look_for_a_huge_late_transaction_is_planned_for_its_own_values_whatever_is_set(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect()
    connection.autocommit = True
    connection.execute("SET plan_cache_mode = force_generic_plan")
    log, seen = LogReader(connection), []
    look = log._rows

    def rows(sql: str, **params: Any) -> Any:
        seen.append(setting())
        return look(sql, **params)

    def setting() -> Any:
        return connection.execute("SHOW plan_cache_mode").fetchone()

    monkeypatch.setattr(log, "_rows", rows)
    log._with_late(Cursor({0: 10}), Snapshot("3:3:"))
    assert (seen, setting()) == ([("force_custom_plan",)], ("force_generic_plan",))


def test_what_is_read_will_survive_a_crash_though_no_commit_was_waited_for(
    connect: Connect,
) -> None:
    connection, writer = connect(), connect()
    for one in (connection, writer):
        one.autocommit = True
        one.execute("SET synchronous_commit = off")
    log, cursor = LogReader(connection), Cursor.at_beginning(range(16))
    for number in range(20):
        insert(writer, str(number))
        (written,) = writer.execute("SELECT pg_current_wal_insert_lsn()").fetchone() or (None,)
        page = log.read(cursor, 10)
        kept = writer.execute("SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn", (written,))
        assert (bodies(page), kept.fetchone()) == ([str(number)], (True,))
        cursor = page.cursor


def test_nothing_is_read_on_from_the_cursor_of_another_server(connect: Connect) -> None:
    connection = connect()
    connection.autocommit = True
    ((server,),) = connection.execute(f"SELECT {SERVER}".encode()).fetchall()
    cursor = Cursor.at_beginning(range(16))
    assert LogReader(connection, server=server).read(cursor, 10).complete
    with pytest.raises(psycopg.OperationalError, match="another server"):
        LogReader(connection, server="1.5").read(cursor, 10)


def test_a_backlog_waits_for_the_disk_once_however_much_is_written_meanwhile(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, writer, flushes = reader(connect), connect(), 0
    make_durable = LogReader.make_durable

    def counted(self: LogReader) -> int:
        nonlocal flushes
        flushes += 1
        return make_durable(self)

    monkeypatch.setattr(LogReader, "make_durable", counted)
    for number in range(5):
        insert(writer, str(number))
    writer.commit()
    writer.autocommit = True
    cursor = Cursor.at_beginning(range(16))
    for number in range(5):
        # As hint bits do where checksums are on.
        writer.execute("SELECT pg_logical_emit_message(false, 'test', 'not on disk')")
        page = log.read(cursor, 1)
        assert (bodies(page), flushes) == ([str(number)], 1)
        cursor = page.cursor
    writer.execute("SET synchronous_commit = off")
    insert(writer, "another")
    assert (bodies(log.read(cursor, 1)), flushes) == (["another"], 2)


class Writers:
    """Writers of a few keys with random delays, rollbacks and savepoints; they know what they have committed."""

    def __init__(self, connect: Connect, seed: int, count: int = 8, transactions: int = 25) -> None:
        self.committed: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        with connect() as setup:
            setup.execute("CREATE TABLE counter (key integer PRIMARY KEY, value integer NOT NULL)")
            setup.execute("INSERT INTO counter SELECT generate_series(0, 9), 0")
        self.threads = [
            threading.Thread(
                target=self._write,
                args=(connect(), random.Random(seed * 100 + number), transactions),
            )
            for number in range(count)
        ]

    def _write(
        self, connection: psycopg.Connection[Any], chance: random.Random, transactions: int
    ) -> None:
        pause = threading.Event()
        for _ in range(transactions):
            if chance.random() < 0.4:
                connection.execute("SELECT pg_current_xact_id()")
                pause.wait(chance.random() * 0.005)
            events = [
                self._event(connection, key)
                for key in sorted(chance.sample(range(10), chance.randint(1, 3)))
            ]
            if chance.random() < 0.3:
                connection.execute("SAVEPOINT s")
                self._event(connection, chance.randrange(events[-1][0], 10))
                connection.execute("ROLLBACK TO SAVEPOINT s")
            pause.wait(chance.random() * chance.choice([0.0, 0.002, 0.02]))
            if chance.random() < 0.2:
                connection.rollback()
                continue
            connection.commit()
            with self._lock:
                self.committed += events

    def _event(self, connection: psycopg.Connection[Any], key: int) -> tuple[int, int]:
        """The key's row is locked first, and counts: so the numbers of a key are the order of its commits."""
        row = connection.execute(
            "UPDATE counter SET value = value + 1 WHERE key = %s RETURNING value", (key,)
        ).fetchone()
        assert row is not None
        connection.execute(INSERT, (key % 4, uuid4(), str(key), f"{key}:{row[0]}".encode()))
        return key, row[0]


def read_while(connect: Connect, writers: Writers, seed: int) -> list[tuple[int, int]]:
    """Read with pages of any size, stopping anywhere, and now and then from the cursor as it would have been stored.

    Some are asked for ahead, and some of those are dropped.
    """
    chance = random.Random(seed)
    log, storing = reader(connect), connect()
    storing.autocommit = True
    cursor = Cursor.at_beginning(range(16))
    found: list[tuple[int, int]] = []
    ended = False
    while True:
        page = log.read(cursor, chance.choice([1, 2, 7, 50, 200]))
        found += [
            (int(key), int(number)) for key, number in (body.split(":") for body in bodies(page))
        ]
        cursor = page.cursor
        if chance.random() < 0.3 and not cursor.late:
            (xid,) = storing.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() or (0,)
            cursor = replace(cursor, ceiling=xid)
            log = reader(connect)
        if page.complete and ended:
            return found
        ended = not any(thread.is_alive() for thread in writers.threads)
        if chance.random() < 0.5:
            log.read_ahead(cursor, chance.choice([1, 2, 7, 50, 200]))
        if chance.random() < 0.2:
            cursor = replace(cursor)


@pytest.mark.parametrize("seed", range(3))
def test_every_committed_event_is_delivered_once_and_in_the_order_of_its_key(
    connect: Connect, seed: int
) -> None:
    writers = Writers(connect, seed)
    for thread in writers.threads:
        thread.start()
    found = read_while(connect, writers, seed)
    assert sorted(found) == sorted(writers.committed)
    for key in range(10):
        of_key = [number for its_key, number in found if its_key == key]
        assert of_key == sorted(of_key)
