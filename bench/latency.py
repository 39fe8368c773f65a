"""From a commit to the broker, and to the start of the handler, at 100 events a second, beside what Celery alone does
after the commit.

A p99 says how the machine was in its worst moments, and it is another one from minute to minute. So the two sides take
turns by the second, and whatever goes on meets both; and it is taken from a thousand events, of which ten lie above it.
"""

from __future__ import annotations

import json
import os
import re
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import quantiles
from typing import Any, Final

import psycopg
from redis import Redis
from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session

from bench.cpu import read_cpu, spent_since
from bench.figures import Figure, Timer, allowed
from bench.processes import relay, worker
from bench.publishing import conninfo
from outbox.buses import Topology, open_bus

NAMES: Final = (
    "commit to handler, p99",
    "commit to handler, p50",
    "commit to handler after a quiet second, p50",
    "commit to broker, p99",
    "commit to broker, p50",
)
PROBE: Final = "bench_latency_probe.events"
"""The queue from which messages are taken as they come, by nothing but a loop."""
NUMBER: Final = re.compile(rb"number\W+(\d+)")


@dataclass(frozen=True)
class Flow:
    """How many events, how far apart; the first are sent and not counted."""

    events: int
    seconds_apart: float
    warm_up: int


TURNS: Final = 8
STEADY: Final = Flow(125, 0.01, 25)
"""In each turn."""
SELDOM: Final = Flow(10, 1.0, 2)
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

        def publish_to_probe(session: Session, number: int) -> None:
            latency_app.service.publish(session, latency_app.Probed(number))

        def send_to_probe(_: Session, number: int) -> Callable[[], object]:
            send = latency_app.tick_plain.apply_async
            return lambda: send(kwargs={"number": number}, queue=PROBE)

        both = _InTurn(database, [publish, delay])
        alone = _InTurn(database, [publish])
        seldom = _InTurn(database, [publish, delay], SELDOM, turns=1)
        stack.enter_context(_written_down_on_arrival(database, broker_url))
        to_broker = _InTurn(database, [publish_to_probe, send_to_probe])

        yield [
            Figure(
                NAMES[0], "ms", both.percentile(publish, 99), both.percentile(delay, 99), "task.delay() after it",
                ceiling=1.5,
            ),
            Figure(
                NAMES[1], "ms", alone.percentile(publish, 50), allowed(0.015), "allowed", ceiling=1, reach=0.2
            ),
            Figure(
                NAMES[2], "ms", seldom.percentile(publish, 50), seldom.percentile(delay, 50), "task.delay() after it",
                ceiling=2, reach=1.5,
            ),
            Figure(
                NAMES[0], "ms", alone.percentile(publish, 99), allowed(0.010), "wanted", reach=1
            ),
            *(
                Figure(
                    name, "ms", to_broker.percentile(publish_to_probe, percent),
                    to_broker.percentile(send_to_probe, percent), "apply_async() after it",
                )
                for name, percent in zip(NAMES[3:], (99, 50), strict=True)
            ),
        ]  # fmt: skip


@contextmanager
def _written_down_on_arrival(database: URL, broker_url: str) -> Iterator[None]:
    """Take messages from the probe's queue in a process of its own, and note when each came."""
    bus = open_bus(broker_url, "bench_latency")
    bus.declare(Topology(PROBE, ("bench.probed",), "bench_latency"))
    bus.close()
    taking = get_context("spawn").Process(
        target=_take, args=(conninfo(database), broker_url), daemon=True
    )
    taking.start()
    try:
        yield
    finally:
        taking.terminate()
        taking.join()


def _take(database: str, broker_url: str) -> None:
    client: Any = Redis.from_url(broker_url, socket_timeout=None)
    with psycopg.connect(database, autocommit=True) as connection:
        while True:
            _, message = client.brpop([PROBE])
            at = time.time()
            found = NUMBER.search(b64decode(json.loads(message)["body"]))
            if found is None:
                continue  # a roll
            began = "INSERT INTO bench_began (number, at) VALUES (%s, %s)"
            connection.execute(began, (int(found[1]), at))


@dataclass
class _Taken:
    """What one side has taken in one round."""

    latencies: list[float] = field(default_factory=list)
    events: int = 0
    cpu: Counter[str] = field(default_factory=Counter)


@dataclass
class _InTurn:
    """Sides that are measured together: whichever is asked for first has all of them run, in turns."""

    database: URL
    sends: Sequence[Send]
    flow: Flow = STEADY
    turns: int = TURNS
    _kept: dict[Send, _Taken] = field(default_factory=dict)

    def percentile(self, send: Send, percent: int) -> Callable[[Timer], None]:
        """Of the latencies of *send*, which is one of the sides."""

        def measured(timer: Timer) -> None:
            if send not in self._kept:
                self._run()
            taken = self._kept.pop(send)
            timer.cpu.update({name: spent / taken.events for name, spent in taken.cpu.items()})
            timer.work += 1
            timer.seconds += quantiles(taken.latencies, n=100)[percent - 1]

        return measured

    def _run(self) -> None:
        self._kept = {send: _Taken() for send in self.sends}
        for _ in range(self.turns):
            for send, taken in self._kept.items():
                cpu_before = read_cpu()
                taken.latencies += _latencies(self.database, send, self.flow)
                taken.cpu.update(spent_since(cpu_before))
                taken.events += self.flow.warm_up + self.flow.events


def _latencies(database: URL, send: Send, flow: Flow) -> list[float]:
    count = flow.warm_up + flow.events
    engine = create_engine(database)
    committed: dict[int, float] = {}
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        connection.execute("TRUNCATE bench_began")
        began = time.monotonic()
        for number in range(count):
            with Session(engine) as session:
                after = send(session, number)
                session.commit()
            committed[number] = time.time()
            if after is not None:
                after()
            time.sleep(max(0.0, began + (number + 1) * flow.seconds_apart - time.monotonic()))
        starts = _await_starts(connection, count)
    engine.dispose()
    return [at - committed[number] for number, at in starts.items() if number >= flow.warm_up]


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
