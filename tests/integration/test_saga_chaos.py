"""Sagas through real processes, PostgreSQL and RabbitMQ while every kind of process is killed at random:
whole workers, their main process or a child of it alone, relays, and the API that customers ask.

`OUTBOX_CHAOS_SAGAS=1000` makes it long; `OUTBOX_CHAOS_SEED` repeats the choice of whom to kill.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from random import Random

import psutil
import pytest

from examples.order_saga.demo.books import read_books
from examples.order_saga.demo.load import customers
from examples.order_saga.demo.processes import Process, wait_until_ready
from examples.order_saga.demo.services import api_answers
from examples.order_saga.demo.shop import Shop
from examples.order_saga.demo.stage import Stage, stage
from examples.order_saga.demo.story import Told
from examples.order_saga.demo.summary import summarize
from examples.order_saga.demo.traffic import examine
from examples.order_saga.demo.watch import watching

SAGAS = int(os.environ.get("OUTBOX_CHAOS_SAGAS", "40"))
SEED = int(os.environ["OUTBOX_CHAOS_SEED"])
SAGAS_PER_KILL = 4
SECONDS_BETWEEN_KILLS = (0.2, 1.2)
ORDERS_PER_SECOND = 50.0
CUSTOMERS_WAIT_SECONDS = 60.0
PREFORK = ("--pool", "prefork", "--concurrency", "2")
POOLS = {"one by one": PREFORK, "in batches": (*PREFORK, "--outbox-batch", "10")}
LIMIT = 120 + SAGAS

pytestmark = pytest.mark.timeout(LIMIT + 60)


@pytest.mark.parametrize("pool", POOLS)
def test_every_saga_settles_whole_while_every_kind_of_process_is_killed_at_random(
    rabbitmq_url: str, pool: str
) -> None:
    print(f"OUTBOX_CHAOS_SEED={SEED}, {SAGAS} sagas")
    shop = Shop.of(SAGAS, SEED)
    with stage(
        shop, database_url=None, broker_url=rabbitmq_url, keep=False, worker_options=POOLS[pool]
    ) as set_up:
        told, killed = chaos(set_up, shop, Random(SEED))
    print(f"killed: {dict(killed)}")
    assert killed.keys() == VICTIMS.keys()
    assert killed.total() >= SAGAS // SAGAS_PER_KILL
    summary = summarize(shop, told)
    assert not summary.violations, summary.violations
    assert len(told.accepted) == SAGAS


def chaos(set_up: Stage, shop: Shop, random: Random) -> tuple[Told, Counter[str]]:
    services = set_up.services.values()
    for service in services:
        service.start()
    for service in services:
        service.wait_until_ready(60)
    killed: Counter[str] = Counter()
    victims = list(VICTIMS) * -(-SAGAS // SAGAS_PER_KILL // len(VICTIMS))
    random.shuffle(victims)
    with (
        watching(set_up.database_urls) as watch,
        customers(set_up.base_url, ORDERS_PER_SECOND, CUSTOMERS_WAIT_SECONDS) as load,
    ):
        api = set_up.services["order"].api
        assert api is not None
        wait_until_ready(api, lambda: api_answers(load.client))
        began, orders, placed = watch.now(), iter(shop.orders), 0
        next_kill, deadline = time.monotonic(), time.monotonic() + LIMIT
        while True:
            supervise(set_up)
            # As slowly as is killed, so that there is work under way each time.
            due = SAGAS if not victims else (killed.total() + 1) * SAGAS_PER_KILL
            placed += load.tick(orders, at_most=min(due, SAGAS) - placed)
            if victims and time.monotonic() > next_kill:
                if VICTIMS[victims[-1]](set_up, random):
                    killed[victims.pop()] += 1
                next_kill = time.monotonic() + random.uniform(*SECONDS_BETWEEN_KILLS)
            elif not victims and placed == SAGAS and load.all_answered:
                late = time.monotonic() > deadline
                if late or (not watch.glance().undecided and watch.is_quiet):
                    books = read_books(set_up.database_urls)
                    traffic = examine(books, {})
                    if late or not traffic.lost:
                        break
            time.sleep(0.02)
        told = Told(
            accepted=list(load.accepted), refused=list(load.refused), killed_at=began,
            restarted_at=began, back_at=began, joined_at=began, replayed=0, books=books,
            traffic=traffic,
        )  # fmt: skip
    return told, killed


def supervise(set_up: Stage) -> None:
    """Start again what has ended by itself: a worker of Celery's does where a child dies while the pool starts."""
    for service in set_up.services.values():
        for process in service.processes:
            if not process.is_running:
                _kill_and_start(process)


# ---- whom to kill: each says whether somebody was there ----


def a_worker(set_up: Stage, random: Random) -> bool:
    """With all of its children, as when the machine dies."""
    return _kill_and_start(random.choice([one.worker for one in set_up.services.values()]))


def the_main_process_of_a_worker(set_up: Stage, random: Random) -> bool:
    """Its children go on with what they have in hand, beside the next worker."""
    worker = random.choice([one.worker for one in set_up.services.values()])
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.start()
    return True


def a_child_of_a_worker(set_up: Stage, random: Random) -> bool:
    """The pool makes another."""
    worker = random.choice([one.worker for one in set_up.services.values()])
    children = psutil.Process(worker.pid).children() if worker.is_running else []
    if children:
        random.choice(children).kill()
    return bool(children)


def a_relay(set_up: Stage, random: Random) -> bool:
    relays = [one.relay for one in set_up.services.values() if one.relay is not None]
    return _kill_and_start(random.choice(relays))


def the_api(set_up: Stage, random: Random) -> bool:
    api = set_up.services["order"].api
    assert api is not None
    return _kill_and_start(api)


def _kill_and_start(process: Process) -> bool:
    process.kill()
    process.start()
    return True


VICTIMS: dict[str, Callable[[Stage, Random], bool]] = {
    one.__name__: one
    for one in (a_worker, the_main_process_of_a_worker, a_child_of_a_worker, a_relay, the_api)
}
