"""Publishing and reading the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import psycopg
from sqlalchemy import URL

from bench.figures import Figure, Measured, Timer
from bench.writers import (
    BY_HAND,
    JSON_BY_HAND,
    ORDER_ONLY,
    PUBLISHED,
    Run,
    as_processes,
    as_threads,
)
from outbox.reader import Cursor, LogReader

FILL = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body)
SELECT mod(i, 16), gen_random_uuid(), 'order.created', 1, i::text,
    convert_to('{"id":' || i || ',"x":"' || repeat('y', 260) || '"}', 'UTF8')
FROM generate_series(1, %s) AS i
"""


FRESH = 100_000


def conninfo(database: URL) -> str:
    return database.set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def figures(database: URL) -> Iterator[list[Figure]]:
    info = conninfo(database)
    with psycopg.connect(info, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS orders (id bigserial PRIMARY KEY, customer text)"
        )
    url = database.render_as_string(hide_password=False)
    with ExitStack() as stack:
        found: list[Figure] = []
        for kind, writers in (("processes", as_processes), ("threads", as_threads)):
            for driver in ("psycopg", "SQLAlchemy"):
                found += _publishing(
                    f"8 {kind}, {driver}", cache(lambda w=writers, d=driver: w(stack, d, url))
                )
        found.append(Figure(
            "read the log with 200,000 events behind", "events/s", lambda timer: _read(timer, info, 200_000),
            lambda timer: _read(timer, info, 0), "nothing behind", 0.95,
        ))  # fmt: skip
        yield found


def _publishing(how: str, start: Callable[[], Run]) -> list[Figure]:
    """Publishing beside the same insert by hand; without a floor, beside one that makes JSON, and beside no event."""

    def writing(event: str) -> Measured:
        return lambda timer: start()(timer, event)

    name = f"publish with an order, {how}"
    ours = writing(PUBLISHED)
    return [
        Figure(name, "tx/s", ours, writing(BY_HAND), BY_HAND, 0.95, reach=1.1),
        Figure(f"{name}, beside JSON by hand", "tx/s", ours, writing(JSON_BY_HAND), JSON_BY_HAND),
        Figure(f"{name}, beside the order alone", "tx/s", ours, writing(ORDER_ONLY), ORDER_ONLY, reach=0.85),
    ]  # fmt: skip


def _read(timer: Timer, info: str, behind: int) -> None:
    """Read fresh events with *behind* delivered ones before them in the log."""
    with psycopg.connect(info, autocommit=True) as connection:
        connection.execute("TRUNCATE outbox.outbox_event")
        cursor = Cursor.at_beginning(range(16))
        if behind:
            fill(connection, behind)
            log = LogReader(connection)
            while not (page := log.read(cursor, 5_000)).complete:
                cursor = page.cursor
            cursor = page.cursor
        fill(connection, FRESH)
        log = LogReader(connection)
        with timer.counting(FRESH):
            while not (page := log.read(cursor, 500)).complete:
                cursor = page.cursor


def fill(connection: psycopg.Connection[Any], count: int) -> None:
    """Put *count* events of some 300 bytes into the log."""
    connection.execute(FILL, (count,))
