"""Eight writers, each of which publishes in the transaction that inserts an order: as threads, and as processes.

Most services run as processes (prefork), and there a writer pays for its own Python only. Threads of one interpreter
wait for each other's: what costs a microsecond costs several there.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from bench.figures import Timer
from outbox.events import Registry
from outbox.publishing import publish

WRITERS, TRANSACTIONS = 8, 300
PUBLISHED, ORDER_ONLY = "publish", "order only"
BY_HAND, JSON_BY_HAND = "INSERT by hand", "INSERT by hand of json.dumps"
"""Of bytes that are there already; of an event that is made into JSON as by hand, unchecked."""
Run = Callable[[Timer, str], None]
"""Has all writers write the order and what the second argument names."""

registry = Registry()
INSERT_ORDER = "INSERT INTO orders (customer) VALUES ('somebody')"
INSERT_BY_HAND = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body) VALUES (%s, %s, %s, %s, %s, %s)
"""
ORDER_IN_SESSION = text(INSERT_ORDER)
INSERT_IN_SESSION = text("""
INSERT INTO outbox.outbox_event (lane, event_id, type, version, key, body)
VALUES (:lane, :id, :type, :version, :key, :body)
""")


@registry.event("order.created", key="order_id")
@dataclass
class OrderCreated:
    order_id: int
    customer: str = "somebody"
    note: str = "x" * 60


class Writer:
    """One connection, and what is written through it: a transaction at a time."""

    def __init__(self, driver: str, url: str) -> None:
        self.session = None if driver == "psycopg" else Session(create_engine(url))
        self.connection = None
        if self.session is None:
            info = make_url(url).set(drivername="postgresql")
            self.connection = psycopg.connect(info.render_as_string(hide_password=False))

    def write(self, event: str, transactions: int) -> None:
        once = self._in_session if self.session is not None else self._through_psycopg
        for _ in range(transactions):
            once(event)

    def _through_psycopg(self, event: str) -> None:
        connection: Any = self.connection
        connection.execute(INSERT_ORDER)
        if event == PUBLISHED:
            publish(connection, OrderCreated(1), registry=registry)
        elif event != ORDER_ONLY:
            event_id, body = _made_by_hand(event)
            connection.execute(INSERT_BY_HAND, (1, event_id, "order.created", 1, "1", body))
        connection.commit()

    def _in_session(self, event: str) -> None:
        session: Any = self.session
        session.execute(ORDER_IN_SESSION)
        if event == PUBLISHED:
            publish(session, OrderCreated(1), registry=registry)
        elif event != ORDER_ONLY:
            event_id, body = _made_by_hand(event)
            values = {"lane": 1, "id": event_id, "type": "order.created", "version": 1, "key": "1"}
            session.execute(INSERT_IN_SESSION, values | {"body": body})
        session.commit()


def _made_by_hand(event: str) -> tuple[UUID, bytes]:
    event_id = uuid4()
    if event == BY_HAND:
        return event_id, b"x" * 384
    said = {
        "specversion": "1.0", "id": str(event_id), "source": "order", "type": "order.created",
        "time": datetime.now(UTC).isoformat(), "partitionkey": "1", "data": asdict(OrderCreated(1)),
    }  # fmt: skip
    return event_id, json.dumps(said).encode()


def as_threads(_stack: ExitStack, driver: str, url: str) -> Run:
    """Writers in threads of this process."""
    writers = [Writer(driver, url) for _ in range(WRITERS)]

    def run(timer: Timer, event: str) -> None:
        start = threading.Barrier(WRITERS + 1, timeout=120)
        threads = [
            threading.Thread(target=_write, args=(writer, start, event)) for writer in writers
        ]
        for thread in threads:
            thread.start()
        start.wait()
        with timer.counting(WRITERS * TRANSACTIONS):
            start.wait()
            for thread in threads:
                thread.join()

    return run


def as_processes(stack: ExitStack, driver: str, url: str) -> Run:
    """Writers in a process each, which end with *stack*."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(WRITERS + 1, timeout=120)
    pool = stack.enter_context(context.Pool(WRITERS, _enter_process, (driver, url, start)))

    def run(timer: Timer, event: str) -> None:
        writing = pool.map_async(_write_in_process, [event] * WRITERS, chunksize=1)
        start.wait()  # each process has one of them: none takes a second before all have begun
        with timer.counting(WRITERS * TRANSACTIONS):
            start.wait()
            writing.get()

    return run


def _write(writer: Writer, start: Any, event: str) -> None:
    writer.write(event, 10)  # statements get prepared
    start.wait()
    start.wait()  # meanwhile the CPU times are read
    writer.write(event, TRANSACTIONS)


_of_this_process: list[tuple[Writer, Any]] = []


def _enter_process(driver: str, url: str, start: Any) -> None:
    _of_this_process[:] = [(Writer(driver, url), start)]


def _write_in_process(event: str) -> None:
    ((writer, start),) = _of_this_process
    _write(writer, start, event)
