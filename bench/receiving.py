"""From a full queue to rows in the database, one for each event, by a worker of two processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import URL

from bench.figures import Figure, Timer
from bench.processes import worker
from bench.publishing import conninfo
from outbox.buses import Topology, open_bus
from outbox.buses.base import OutgoingMessage
from outbox.writing import encode

EVENTS = 20_000
TASKS = 4_000
PROCESSES = 2
PATIENCE_SECONDS = 120.0
FILLER = "y" * 200
TABLE = "CREATE TABLE IF NOT EXISTS bench_received (id bigint GENERATED ALWAYS AS IDENTITY, customer int, filler text)"
BATCH = ("--outbox-batch", "100")


def figures(database: URL, broker_url: str) -> Iterator[Figure]:
    broker = "Redis" if broker_url.startswith("redis") else "RabbitMQ"
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        connection.execute(TABLE)
    os.environ |= {
        "BENCH_DATABASE_URL": database.render_as_string(hide_password=False),
        "BENCH_BROKER_URL": broker_url,
    }
    control = _received(database, "plain", (), lambda: _fill_plain(broker_url, TASKS), TASKS)
    for what, app, options, floor, reach in (
        ("one by one", "each", (), None, None),
        ("in batches, one write per event", "each", BATCH, 5, 6),
        ("in batches, written together", "whole", BATCH, 5, 15),
    ):
        count = EVENTS if options else TASKS
        yield Figure(
            f"receive from {broker} {what}", "events/s",
            _received(database, app, options, _filling(broker_url, app, count), count),
            control, "a plain Celery task", floor, reach=reach,
        )  # fmt: skip


def _received(
    database: URL, app: str, options: Sequence[str], fill: Callable[[], None], count: int
) -> Callable[[Timer], None]:
    """Fill the queue, start a worker, and time it from the first row that is seen to the last."""

    def measured(timer: Timer) -> None:
        fill()
        with psycopg.connect(conninfo(database), autocommit=True) as connection:
            connection.execute("TRUNCATE bench_received")
            with worker(f"bench.receive_app:{app}", "--concurrency", str(PROCESSES), *options):
                first = _await_rows(connection, 1)
                with timer.counting(count - first):
                    _await_rows(connection, count)

    return measured


def _await_rows(connection: psycopg.Connection[Any], count: int) -> int:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        row = connection.execute("SELECT count(*) FROM bench_received").fetchone()
        assert row is not None
        if row[0] >= count:
            return int(row[0])
        if time.monotonic() > deadline:
            raise RuntimeError(f"{row[0]} of {count} rows in {PATIENCE_SECONDS} s")
        time.sleep(0.02)


def _filling(broker_url: str, app: str, count: int) -> Callable[[], None]:
    from bench import receive_app

    registry = receive_app.registry
    queue = f"bench_{app}.events"

    def fill() -> None:
        bus = open_bus(broker_url, "bench_receive")
        bus.declare(Topology(queue, ("bench.received",), "bench_receive"))
        event = receive_app.Received(1, FILLER)
        for _ in range(0, count, 500):
            envelopes = [encode(registry.of(event), event, source="bench") for _ in range(500)]
            messages = [
                OutgoingMessage(str(one.id), one.type, str(uuid4()), one.body, 0, 0, queue=queue)
                for one in envelopes
            ]
            bus.send(messages).wait()
        bus.close()

    return fill


def _fill_plain(broker_url: str, count: int) -> None:
    from bench import receive_app

    app = receive_app.plain_app(broker_url)
    with app.connection_for_write() as connection:
        producer = connection.Producer()
        for _ in range(count):
            app.send_task("bench.write", args=[1, FILLER], producer=producer)
