"""What waking relays costs those who publish: eight writers with it, without it, and with a NOTIFY of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Final

import psycopg
from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.orm import Session

from bench.figures import Figure, Timer
from bench.lanes import await_holders
from bench.processes import relay
from bench.publishing import conninfo
from bench.writers import ORDER_IN_SESSION, OrderCreated, registry
from outbox.doorbell import wake_relays
from outbox.publishing import publish

WRITERS: Final = 8
SECONDS: Final = 3.0
NOTIFY: Final = text("NOTIFY outbox_outbox")
ORDERS: Final = "CREATE TABLE IF NOT EXISTS orders (id bigserial PRIMARY KEY, customer text)"


def figures(database: URL, broker_url: str) -> Iterator[Figure]:
    def measured(write: Callable[[Session], None], *, wakes: bool) -> Callable[[Timer], None]:
        return lambda timer: _measure(timer, database, broker_url, write, wakes)

    without = measured(_publish, wakes=False)
    yield Figure(
        "publish and wake the relays, 8 writers", "tx/s", measured(_publish, wakes=True), without, "waking none",
        floor=0.97, reach=0.98,
    )  # fmt: skip
    yield Figure(
        "the same by NOTIFY in the transaction", "tx/s", measured(_publish_and_notify, wakes=False), without,
        "waking none",
    )  # fmt: skip


def _publish(session: Session) -> None:
    session.execute(ORDER_IN_SESSION)
    publish(session, OrderCreated(1), registry=registry)
    session.commit()


def _publish_and_notify(session: Session) -> None:
    session.execute(ORDER_IN_SESSION)
    publish(session, OrderCreated(1), registry=registry)
    session.execute(NOTIFY)
    session.commit()


def _measure(
    timer: Timer, database: URL, broker_url: str, write: Callable[[Session], None], wakes: bool
) -> None:
    """With a relay at work, as it is the one that is woken."""
    engine = create_engine(database, pool_size=WRITERS)
    with (
        psycopg.connect(conninfo(database), autocommit=True) as connection,
        relay(database, broker_url, "--exchange", "bench_waking"),
        closing(wake_relays(engine)) if wakes else nullcontext(),
    ):
        connection.execute(ORDERS)
        await_holders(connection, 1)
        _run(timer, engine, write)
    engine.dispose()


def _run(timer: Timer, engine: Engine, write: Callable[[Session], None]) -> None:
    counts = [0] * WRITERS
    ready, over = threading.Barrier(WRITERS + 1), threading.Event()

    def work(number: int) -> None:
        with Session(engine) as session:
            for _ in range(50):
                write(session)
            ready.wait()
            while not over.is_set():
                write(session)
                counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    ready.wait()
    with timer.counting(0):
        over.wait(SECONDS)
        timer.work += sum(counts)
    over.set()
    for thread in threads:
        thread.join()
