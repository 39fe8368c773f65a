"""Publishing and reading the log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import URL

from bench.figures import Figure, Timer
from outbox.events import Registry
from outbox.publishing import publish
from outbox.reader import Cursor, LogReader

WRITERS, TRANSACTIONS = 8, 40
registry = Registry()
INSERT_BY_HAND = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body) VALUES (%s, %s, %s, %s, %s, %s)
"""

FILL = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body)
SELECT mod(i, 16), gen_random_uuid(), 'order.created', 1, i::text,
    convert_to('{"id":' || i || ',"x":"' || repeat('y', 260) || '"}', 'UTF8')
FROM generate_series(1, %s) AS i
"""


@registry.event("order.created", key="order_id")
@dataclass
class OrderCreated:
    order_id: int
    customer: str = "somebody"
    note: str = "x" * 60


def conninfo(database: URL) -> str:
    return database.set(drivername="postgresql").render_as_string(hide_password=False)


def figures(database: URL) -> Iterator[Figure]:
    info = conninfo(database)
    with psycopg.connect(info, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS orders (id bigserial PRIMARY KEY, customer text)"
        )
    yield Figure(
        "publish with an order, 8 writers", "tx/s", lambda timer: _write(timer, info, _published),
        lambda timer: _write(timer, info, _inserted_by_hand), "INSERT by hand", 0.95,
    )  # fmt: skip
    yield Figure(
        "read the log with 200,000 events behind", "events/s", lambda timer: _read(timer, info, 200_000),
        lambda timer: _read(timer, info, 0), "nothing behind", 0.95,
    )  # fmt: skip


def _published(connection: psycopg.Connection[Any]) -> None:
    publish(connection, OrderCreated(1), registry=registry)


def _inserted_by_hand(connection: psycopg.Connection[Any]) -> None:
    connection.execute(INSERT_BY_HAND, (1, uuid4(), "order.created", 1, "1", b"x" * 300))


def _write(timer: Timer, info: str, event: Any) -> None:
    def write() -> None:
        with psycopg.connect(info) as connection:
            for _ in range(TRANSACTIONS):
                connection.execute("INSERT INTO orders (customer) VALUES ('somebody')")
                event(connection)
                connection.commit()

    threads = [threading.Thread(target=write) for _ in range(WRITERS)]
    with timer.counting(WRITERS * TRANSACTIONS):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _read(timer: Timer, info: str, behind: int) -> None:
    """Read 20,000 fresh events with *behind* delivered ones before them in the log."""
    with psycopg.connect(info, autocommit=True) as connection:
        connection.execute("TRUNCATE outbox.outbox_event")
        cursor = Cursor.at_beginning(range(16))
        if behind:
            fill(connection, behind)
            log = LogReader(connection)
            while not (page := log.read(cursor, 5_000)).complete:
                cursor = page.cursor
            cursor = page.cursor
        fill(connection, 20_000)
        log = LogReader(connection)
        with timer.counting(20_000):
            while not (page := log.read(cursor, 500)).complete:
                cursor = page.cursor


def fill(connection: psycopg.Connection[Any], count: int) -> None:
    """Put *count* events of some 300 bytes into the log."""
    connection.execute(FILL, (count,))
