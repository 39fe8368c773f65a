"""Sagas through real processes, PostgreSQL and RabbitMQ while workers and relays are killed at random.

`OUTBOX_CHAOS_SAGAS=1000` makes it long; `OUTBOX_CHAOS_SEED` repeats the choice of whom to kill.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from random import Random

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
SEED = int(os.environ.get("OUTBOX_CHAOS_SEED", str(int(time.time()) % 1_000_000)))
SAGAS_PER_KILL = 4
SECONDS_BETWEEN_KILLS = (0.2, 1.2)
LIMIT = 120 + SAGAS

pytestmark = pytest.mark.timeout(LIMIT + 60)


def test_every_saga_settles_whole_while_workers_and_relays_are_killed_at_random(
    rabbitmq_url: str,
) -> None:
    print(f"OUTBOX_CHAOS_SEED={SEED}, {SAGAS} sagas")
    shop = Shop.of(SAGAS, SEED)
    with stage(shop, database_url=None, broker_url=rabbitmq_url, keep=False) as set_up:
        told, killed = chaos(set_up, shop, Random(SEED))
    print(f"killed: {dict(killed)}")
    assert sum(killed.values()) >= SAGAS // SAGAS_PER_KILL
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
    mortal: list[Process] = [
        process for one in services for process in (one.worker, one.relay) if process is not None
    ]
    with watching(set_up.database_urls) as watch, customers(set_up.base_url, 50.0) as load:
        api = set_up.services["order"].api
        assert api is not None
        wait_until_ready(api, lambda: api_answers(load.client))
        began, orders, placed = watch.now(), iter(shop.orders), 0
        next_kill, deadline = time.monotonic(), time.monotonic() + LIMIT
        while True:
            placed += load.tick(orders, at_most=SAGAS - placed)
            if sum(killed.values()) * SAGAS_PER_KILL < SAGAS and time.monotonic() > next_kill:
                victim = random.choice(mortal)
                victim.kill()
                victim.start()
                killed[victim.name] += 1
                next_kill = time.monotonic() + random.uniform(*SECONDS_BETWEEN_KILLS)
            elif placed == SAGAS and load.all_answered:
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
