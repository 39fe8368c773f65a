"""What brokers lose comes again by itself, and has its effect once.

Each test is a few losses by default; `OUTBOX_TEST_LOSSES=200` makes it that many.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from sqlalchemy.orm import Session

import outbox
from outbox.buses import open_bus
from outbox.relay import Relay, RelaySettings
from tests.apps import billing as app
from tests.local_servers import LocalRedis
from tests.workers import Billing, Worker, eventually

LOSSES = int(os.environ.get("OUTBOX_TEST_LOSSES", "3"))
SOON = timedelta(milliseconds=300)
QUICK = {"BILLING_DECLARE_EVERY": "1", "BILLING_MISSED_AFTER": "1", "BILLING_VISIBILITY": "1"}

pytestmark = pytest.mark.timeout(120 + 5 * LOSSES)


class Shop:
    """Events of a database carried to a broker, and the service on the same database that bills them."""

    def __init__(self, billing: Billing, broker_url: str) -> None:
        self.billing = billing
        self.published: list[str] = []
        bus = open_bus(broker_url, f"{billing.name}.exchange")
        settings = RelaySettings(rolls=SOON, standings=(SOON, SOON * 5))
        self.relay = Relay(billing.engine.url, bus, settings=settings)

    @contextmanager
    def open(self) -> Iterator[None]:
        self.worker()
        eventually(lambda: self.billing.rows("SELECT FROM outbox.subscription"), 20)
        self.billing.kill_workers()
        thread = threading.Thread(target=self.relay.run)
        thread.start()
        try:
            yield
        finally:
            self.relay.stop()
            thread.join(60)
            self.billing.close()

    def worker(self, *, is_doomed: bool = False, **environment: str) -> Worker:
        options = {**QUICK, **environment}
        return self.billing.worker("--pool", "solo", is_doomed=is_doomed, **options)

    def publish(self, count: int) -> None:
        orders = [f"o{len(self.published) + number}" for number in range(count)]
        with Session(self.billing.engine) as session, session.begin():
            events = [app.Placed(order=order) for order in orders]
            outbox.publish_all(session, events, registry=app.registry)
        self.published += orders

    def purge(self) -> int:
        """Throw away what is in the queue; returns how many messages that was."""
        with self.billing.connection.channel() as channel:
            return int(channel.queue_purge(self.billing.queue))

    def until_whole(self, worker: Worker) -> None:
        """Every effect once, and nothing missed any more."""

        def whole() -> bool:
            return self.billing.effects == sorted(self.published) and not self.billing.rows(
                "SELECT FROM outbox.awaited UNION ALL SELECT FROM outbox.missed_roll"
            )

        eventually(whole, 60 + 3 * LOSSES, lambda: (self.missing, worker.log[-3_000:]))

    @property
    def missing(self) -> list[str]:
        return sorted(set(self.published) - set(self.billing.effects))


@pytest.fixture
def make_shop(make_migrated_database: Callable[[], str], tmp_path: Path) -> Callable[[str], Shop]:
    return lambda broker: Shop(
        Billing(make_migrated_database(), broker, tmp_path, queue_type="classic"), broker
    )


def test_what_a_worker_had_popped_from_redis_when_it_was_killed_comes_again(
    make_shop: Callable[[str], Shop], redis_url: str
) -> None:
    """Between BRPOP and the note that it is unacknowledged a message is nowhere."""
    shop = make_shop(redis_url)
    chance = random.Random(1)
    with shop.open():
        for _ in range(LOSSES):
            shop.publish(20)
            place = f"redis.popped:{chance.randint(1, 12)}"
            doomed = shop.worker(is_doomed=True, OUTBOX_CRASH_AT=place)
            assert doomed.process.wait(30) == -signal.SIGKILL
        lost = len(shop.published) - len(shop.billing.effects)
        assert lost >= 1
        shop.until_whole(shop.worker())


def test_what_was_in_a_queue_when_it_was_purged_comes_again(
    make_shop: Callable[[str], Shop], rabbitmq_url: str
) -> None:
    shop = make_shop(rabbitmq_url)
    with shop.open():
        for _ in range(LOSSES):
            eventually(lambda: shop.publish(20) or shop.purge(), 30)
        shop.publish(10)
        shop.until_whole(shop.worker())


def test_what_redis_forgot_when_it_was_killed_comes_again(
    make_shop: Callable[[str], Shop], private_redis: LocalRedis
) -> None:
    shop = make_shop(private_redis.url)
    with shop.open():
        shop.publish(100)
        eventually(lambda: shop.relay.stats.confirmed >= 100)
        private_redis.kill()
        private_redis.start()
        worker = shop.worker()
        shop.publish(50)
        shop.until_whole(worker)


def test_bindings_come_again_each_time_that_redis_forgets_them(
    make_shop: Callable[[str], Shop], private_redis: LocalRedis
) -> None:
    shop = make_shop(private_redis.url)
    with shop.open(), redis.Redis.from_url(private_redis.url) as client:
        shop.worker()
        for _ in range(4):
            eventually(lambda: client.keys("_kombu.binding.*"), 20)
            client.flushall()


def test_what_redis_forgot_when_it_was_flushed_comes_again_with_the_bindings(
    make_shop: Callable[[str], Shop], private_redis: LocalRedis
) -> None:
    """Nobody's connection was lost, so nobody would bind the queue again of itself."""
    shop = make_shop(private_redis.url)
    with shop.open():
        worker = shop.worker()
        for _ in range(LOSSES):
            shop.publish(60)
            with redis.Redis.from_url(private_redis.url) as client:
                client.flushall()
        shop.publish(20)
        shop.until_whole(worker)
