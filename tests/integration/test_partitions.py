"""Maintenance of the log: with many relays at once, beside writers, and never of what is still to be delivered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors
from sqlalchemy import make_url

from outbox.cursors import CursorStore
from outbox.lanes import Leases
from outbox.partitions import Partitions
from outbox.reader import LogReader

LANES = range(16)
INSERT = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, body) VALUES (0, %s, 'thing.made', 1, 'x')
"""
Connect = Callable[[], psycopg.Connection[Any]]


@pytest.fixture
def connect(migrated_database_url: str) -> Iterator[Connect]:
    url = make_url(migrated_database_url).set(drivername="postgresql")
    opened: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        opened.append(psycopg.connect(url.render_as_string(hide_password=False), autocommit=True))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def insert(connection: psycopg.Connection[Any]) -> None:
    connection.execute(INSERT, (uuid4(),))


def go_to(connection: psycopg.Connection[Any], position: int) -> None:
    connection.execute("SELECT setval('outbox.outbox_event_position', %s)", (position,))


def deliver_everything(connection: psycopg.Connection[Any]) -> int:
    """As a relay that confirms all that there is; returns how much that was."""
    leases, reader, cursors = Leases(connection), LogReader(connection), CursorStore(connection)
    leases.beat()
    (cursor,) = cursors.load(LANES)
    count = 0
    complete = False
    while not complete:
        page = reader.read(cursor, 1_000)
        cursor, complete = page.cursor, page.complete
        count += len(page.events)
    cursors.store(cursor, leases.held)
    leases.release()
    return count


def kept(connection: psycopg.Connection[Any]) -> set[str]:
    return set(Partitions(connection)._bounds())


def test_many_relays_maintain_at_once(connect: Connect) -> None:
    """Nobody fails, writers go on, and each partition is made and dropped once."""
    connections = [connect() for _ in range(6)]
    at_once = threading.Barrier(len(connections))

    def maintain(connection: psycopg.Connection[Any]) -> None:
        partitions = Partitions(connection, retention=timedelta(0))
        at_once.wait(20)
        for _ in range(3):
            partitions.maintain()

    control = connect()
    with ThreadPoolExecutor(len(connections)) as threads:
        for round_number in range(1, 6):
            insert(control)
            deliver_everything(control)
            go_to(control, round_number * 1_000_000 + 1)
            list(threads.map(maintain, connections))
            insert(control)
    assert deliver_everything(control) == 1
    Partitions(control, retention=timedelta(0)).maintain()
    bounds = sorted(Partitions(control)._bounds().values())
    assert bounds[0][0] == 5_000_000
    assert bounds[-1][1] >= 7_000_000
    assert [upper for _, upper in bounds[:-1]] == [lower for lower, _ in bounds[1:]]


def test_writers_wait_for_no_longer_than_the_lock_timeout_of_maintenance(connect: Connect) -> None:
    """Though a transaction that is open all the while keeps the partition from being dropped."""
    control, slow, writer = connect(), connect(), connect()
    insert(control)
    deliver_everything(control)
    slow.execute("BEGIN")
    slow.execute("SELECT FROM outbox.outbox_event")
    go_to(control, 2_500_000)
    # On a busy machine one wait in twenty may become so long, but no more.
    writer.execute("SET lock_timeout = '300ms'")
    done = threading.Event()

    def write() -> int:
        """Until done; how often it had to wait for longer than that."""
        refused = 0
        while not done.is_set():
            try:
                insert(writer)
            except errors.LockNotAvailable:
                refused += 1
        return refused

    partitions = Partitions(control, retention=timedelta(0))
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        try:
            for _ in range(10):
                partitions.maintain()
            assert "outbox_event_p000000000000" in kept(control)
            slow.execute("COMMIT")
            deliver_everything(control)
            for _ in range(10):
                partitions.maintain()
        finally:
            done.set()
    assert "outbox_event_p000000000000" not in kept(control)
    assert writing.result() <= 1


def test_an_event_that_commits_just_before_its_partition_would_be_dropped_is_delivered(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, late = connect(), connect()
    late.execute("BEGIN")
    insert(late)
    go_to(control, 1_500_000)
    insert(control)
    assert deliver_everything(control) == 1
    Partitions(control).maintain()  # so that there is nothing to make below
    partitions = Partitions(control, retention=timedelta(0))
    attempt = partitions._attempt

    def attempt_after_the_commit(*arguments: Any) -> bool:
        late.execute("COMMIT")
        return attempt(*arguments)

    monkeypatch.setattr(partitions, "_attempt", attempt_after_the_commit)
    partitions.maintain()
    assert deliver_everything(control) == 1
    partitions.maintain()
    assert "outbox_event_p000000000000" not in kept(control)


@pytest.mark.parametrize("beyond", [0, 1, 5_000_000])
def test_positions_beyond_all_partitions_go_on_in_new_ones_behind_them(
    connect: Connect, beyond: int
) -> None:
    control = connect()
    go_to(control, max(upper for _, upper in Partitions(control)._bounds().values()) + beyond - 1)
    insert(control)
    Partitions(control).maintain()
    go_to(control, max(upper for _, upper in Partitions(control)._bounds().values()) - 1)
    insert(control)
    assert count_default(control) == 2
    forgetful = Partitions(control, retention=timedelta(0))
    forgetful.maintain()
    assert count_default(control) == 2
    assert deliver_everything(control) == 2
    Partitions(control).maintain()
    assert count_default(control) == 2
    forgetful.maintain()
    assert count_default(control) == 0
    insert(control)
    assert deliver_everything(control) == 1


def count_default(connection: psycopg.Connection[Any]) -> int:
    rows = connection.execute("SELECT FROM outbox.outbox_event_default").fetchall()
    return len(rows)
