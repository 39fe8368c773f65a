"""From a commit to the start of the handler, at 100 events a second, beside `task.delay()` after the commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import quantiles
from typing import Any, Final

import psycopg
from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session

from bench.cpu import read_cpu, spent_since
from bench.figures import Figure, Timer, allowed
from bench.processes import relay, worker
from bench.publishing import conninfo

NAMES: Final = ("commit to handler, p99", "commit to handler, p50")
RATE: Final = 100
EVENTS: Final = 500
WARM_UP: Final = 50
"""The first of a flow may find a relay that has paused for long; they are sent and not counted."""
PATIENCE_SECONDS: Final = 60.0
TABLE: Final = "CREATE TABLE IF NOT EXISTS bench_began (number int, at double precision)"

Send = Callable[[Session, int], Callable[[], object] | None]
"""Says in an open transaction what happened; returns what is to be done after its commit."""


@contextmanager
def figures(database: URL, broker_url: str) -> Iterator[list[Figure]]:
    """The figures, with a relay and both workers at work while the context is open."""
    with ExitStack() as stack:
        with psycopg.connect(conninfo(database), autocommit=True) as connection:
            connection.execute(TABLE)
        os.environ |= {
            "BENCH_DATABASE_URL": database.render_as_string(hide_password=False),
            "BENCH_BROKER_URL": broker_url,
        }
        from bench import latency_app

        def publish(session: Session, number: int) -> None:
            latency_app.service.publish(session, latency_app.Tick(number))

        def delay(_: Session, number: int) -> Callable[[], object]:
            return lambda: latency_app.tick_plain.delay(number)

        two = ("--concurrency", "2")
        stack.enter_context(worker("bench.latency_app:app", *two, "--hostname", "app@latency"))
        plain = ("-Q", "bench_latency_plain", "--hostname", "plain@latency")
        stack.enter_context(worker("bench.latency_app:plain", *two, *plain))
        stack.enter_context(relay(database, broker_url, "--exchange", "bench_latency"))
        _await_the_workers(database, publish, delay)

        def measured(send: Send, percent: int) -> Callable[[Timer], None]:
            return lambda timer: _measure(timer, database, send, percent)

        yield [
            Figure(
                NAMES[0], "ms", measured(publish, 99), measured(delay, 99), "task.delay() after it",
                ceiling=1.5,
            ),
            Figure(
                NAMES[1], "ms", measured(publish, 50), allowed(0.015), "allowed", ceiling=1, reach=0.2
            ),
        ]  # fmt: skip


def _measure(timer: Timer, database: URL, send: Send, percent: int) -> None:
    cpu_before = read_cpu()
    latencies = _latencies(database, send)
    spent = spent_since(cpu_before)
    timer.cpu.update({program: seconds / (WARM_UP + EVENTS) for program, seconds in spent.items()})
    timer.work += 1
    timer.seconds += quantiles(latencies, n=100)[percent - 1]


def _latencies(database: URL, send: Send) -> list[float]:
    engine = create_engine(database)
    committed: dict[int, float] = {}
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        connection.execute("TRUNCATE bench_began")
        began = time.monotonic()
        for number in range(WARM_UP + EVENTS):
            with Session(engine) as session:
                after = send(session, number)
                session.commit()
            committed[number] = time.time()
            if after is not None:
                after()
            time.sleep(max(0.0, began + (number + 1) / RATE - time.monotonic()))
        starts = _await_starts(connection, WARM_UP + EVENTS)
    engine.dispose()
    return [at - committed[number] for number, at in starts.items() if number >= WARM_UP]


def _await_starts(connection: psycopg.Connection[Any], count: int) -> dict[int, float]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        starts = dict(connection.execute("SELECT number, at FROM bench_began").fetchall())
        if len(starts) >= count:
            return starts
        time.sleep(0.05)
    raise RuntimeError(f"{len(starts)} of {count} have begun in {PATIENCE_SECONDS} s")


def _await_the_workers(database: URL, *sends: Send) -> None:
    """Until each way gets through: before that, a queue may not be bound yet."""
    engine = create_engine(database)
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        for send in sends:
            connection.execute("TRUNCATE bench_began")
            while not connection.execute("SELECT 1 FROM bench_began LIMIT 1").fetchall():
                with Session(engine) as session:
                    after = send(session, -1)
                    session.commit()
                if after is not None:
                    after()
                time.sleep(0.5)
    engine.dispose()
