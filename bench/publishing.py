"""Publishing and reading the log."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.orm import Session

from bench.figures import Figure, Timer
from outbox.events import Registry
from outbox.publishing import publish
from outbox.reader import Cursor, LogReader

WRITERS, TRANSACTIONS = 8, 150
registry = Registry()
INSERT_BY_HAND = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body) VALUES (%s, %s, %s, %s, %s, %s)
"""
INSERT_IN_SESSION = text("""
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body)
VALUES (:lane, :id, :type, :version, :key, :body)
""")
INSERT_ORDER = text("INSERT INTO orders (customer) VALUES ('somebody')")

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
    engine = create_engine(database, pool_size=WRITERS)
    yield Figure(
        "publish with an order, psycopg", "tx/s", lambda timer: _through_psycopg(timer, info, _published),
        lambda timer: _through_psycopg(timer, info, _inserted_by_hand), "INSERT by hand", 0.95,
    )  # fmt: skip
    yield Figure(
        "publish with an order, SQLAlchemy", "tx/s", lambda timer: _through_sqlalchemy(timer, engine, _published),
        lambda timer: _through_sqlalchemy(timer, engine, _inserted_by_hand_in_session), "INSERT by hand", 0.95,
    )  # fmt: skip
    yield Figure(
        "read the log with 200,000 events behind", "events/s", lambda timer: _read(timer, info, 200_000),
        lambda timer: _read(timer, info, 0), "nothing behind", 0.95,
    )  # fmt: skip


def _published(connection: Any) -> None:
    publish(connection, OrderCreated(1), registry=registry)


def _inserted_by_hand(connection: psycopg.Connection[Any]) -> None:
    connection.execute(INSERT_BY_HAND, (1, uuid4(), "order.created", 1, "1", b"x" * 300))


def _inserted_by_hand_in_session(session: Session) -> None:
    values = {"lane": 1, "id": uuid4(), "type": "order.created", "version": 1, "key": "1"}
    session.execute(INSERT_IN_SESSION, values | {"body": b"x" * 300})


def _through_psycopg(timer: Timer, info: str, event: Any) -> None:
    def write(connection: psycopg.Connection[Any]) -> None:
        connection.execute("INSERT INTO orders (customer) VALUES ('somebody')")
        event(connection)
        connection.commit()

    with ExitStack() as stack:
        connections = [stack.enter_context(psycopg.connect(info)) for _ in range(WRITERS)]
        _write(timer, [partial(write, connection) for connection in connections])


def _through_sqlalchemy(timer: Timer, engine: Engine, event: Any) -> None:
    def write(session: Session) -> None:
        session.execute(INSERT_ORDER)
        event(session)
        session.commit()

    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(engine)) for _ in range(WRITERS)]
        for session in sessions:
            session.connection()
        _write(timer, [partial(write, session) for session in sessions])


def _write(timer: Timer, writers: list[Callable[[], None]]) -> None:
    def write(once: Callable[[], None]) -> None:
        for _ in range(10):  # statements get prepared
            once()
        ready.wait()
        for _ in range(TRANSACTIONS):
            once()

    ready = threading.Barrier(len(writers) + 1)
    threads = [threading.Thread(target=write, args=(once,)) for once in writers]
    for thread in threads:
        thread.start()
    ready.wait()
    with timer.counting(len(writers) * TRANSACTIONS):
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
