"""What brokers lose comes again by itself, and has its effect once.

Each test sees to it that so much was really lost. By default it is what takes a few seconds; `OUTBOX_TEST_LOSSES=200`
kills 200 workers with what they had popped, and loses five times as many events of each queue.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy.orm import Session

import outbox
from outbox.buses import open_bus
from outbox.envelope import decode
from outbox.relay import Relay
from outbox.rolls import is_control
from tests.apps import billing as app
from tests.local_servers import LocalRedis
from tests.relaying import relaying
from tests.workers import Billing, Worker, eventually

LOSSES = int(os.environ.get("OUTBOX_TEST_LOSSES", "12"))
EVENTS = 5 * LOSSES
"""So many are lost of a queue."""
QUICK = {"BILLING_DECLARE_EVERY": "1", "BILLING_MISSED_AFTER": "1", "BILLING_VISIBILITY": "1"}

pytestmark = pytest.mark.timeout(120 + 5 * LOSSES)


class Shop:
    """Events of a database carried to a broker, and the service on the same database that bills them."""

    relay: Relay

    def __init__(self, billing: Billing, broker_url: str) -> None:
        self.billing = billing
        self.published: list[str] = []
        self._bus = open_bus(broker_url, f"{billing.name}.exchange")

    @contextmanager
    def open(self) -> Iterator[None]:
        self.worker()
        eventually(lambda: self.billing.rows("SELECT FROM outbox.subscription"), 20)
        self.billing.kill_workers()
        try:
            with relaying(self.billing.engine, self._bus) as self.relay:
                yield
        finally:
            self.billing.close()

    def worker(self) -> Worker:
        return self.billing.worker("--pool", "solo", **QUICK)

    def publish(self, count: int, do: str = "") -> None:
        orders = [f"o{len(self.published) + number}" for number in range(count)]
        with Session(self.billing.engine) as session, session.begin():
            events = [app.Placed(order=order, do=do) for order in orders]
            outbox.publish_all(session, events, registry=app.registry)
        self.published += orders

    def publish_and_await(self, count: int, do: str = "") -> None:
        """Until the broker has confirmed them."""
        self.publish(count, do)
        eventually(lambda: self.relay.stats.confirmed >= len(self.published), 30)

    @contextmanager
    def publishing(self, do: str) -> Iterator[None]:
        """On and on, meanwhile."""
        ended = threading.Event()

        def publish() -> None:
            while not ended.wait(0.05):
                self.publish(10, do)

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(60)

    def purge(self) -> list[str]:
        """Purge the queue; some of the orders in it. There are rolls, too, so what is in front is looked at."""
        queue = self.billing.queue
        channel: Any
        with self.billing.connection.channel() as channel:
            first = [channel.basic_get(queue, no_ack=True) for _ in range(10)]
            channel.queue_purge(queue)
        return orders_in(one.body for one in first if one is not None)

    def lost(self, thrown_away: Sequence[str]) -> int:
        """How many of those have had no effect."""
        return len(set(thrown_away) & set(self.missing))

    def until_more_is_handled_and_more_waits(self) -> None:
        handled = len(self.billing.effects)
        eventually(lambda: len(self.billing.effects) > handled and self.billing.queued() >= 20, 30)

    def until_whole(self, worker: Worker) -> None:
        """Every effect once, and nothing missed any more, and nothing under way that would have one."""

        def whole() -> bool:
            return self.billing.effects == sorted(self.published) and not self.billing.rows(
                "SELECT FROM outbox.awaited UNION ALL SELECT FROM outbox.missed_roll"
            )

        eventually(whole, 60 + 3 * LOSSES, lambda: (self.missing, worker.log[-3_000:]))
        self.billing.until_nothing_is_left()
        assert self.billing.effects == sorted(self.published)

    @property
    def missing(self) -> list[str]:
        return sorted(set(self.published) - set(self.billing.effects))


def orders_in(bodies: Iterable[str | bytes]) -> list[str]:
    """The orders that messages are about, without those that are no events."""
    envelopes = (json.loads(body)[0][0].encode() for body in bodies)
    return [decode(one).data["order"] for one in envelopes if not is_control(one)]


class Contents:
    """What a Redis holds of a shop's events."""

    def __init__(self, shop: Shop, client: redis.Redis) -> None:
        self._queue = shop.billing.queue
        self._client: Any = client

    def queued(self) -> list[str]:
        """The orders in the queue."""
        return _orders(self._client.lrange(self._queue, 0, -1))

    def held(self) -> set[str]:
        """Those in the queue, and those that it would give to another worker again."""
        unacknowledged = [json.dumps(json.loads(one)[0]) for one in self._client.hvals("unacked")]
        return {*_orders(unacknowledged), *self.queued()}

    def flush(self) -> list[str]:
        """Have it forget everything; the orders that were in the queue at that moment."""
        with self._client.pipeline(transaction=True) as pipeline:
            entries, _ = pipeline.lrange(self._queue, 0, -1).flushall().execute()
        return _orders(entries)


def _orders(entries: Iterable[str | bytes]) -> list[str]:
    return orders_in(b64decode(json.loads(entry)["body"]) for entry in entries)


@pytest.fixture
def make_shop(make_migrated_database: Callable[[], str], tmp_path: Path) -> Callable[[str], Shop]:
    return lambda broker: Shop(
        Billing(make_migrated_database(), broker, tmp_path, queue_type="classic"), broker
    )


def test_what_a_worker_had_popped_from_redis_when_it_was_killed_comes_again(
    make_shop: Callable[[str], Shop], redis_url: str
) -> None:
    """Between BRPOP and the note that it is unacknowledged a message is nowhere; some of those are rolls."""
    shop = make_shop(redis_url)
    chance = random.Random(1)
    lost: set[str] = set()
    with shop.open(), redis.Redis.from_url(redis_url) as client:
        for _ in range(LOSSES):
            shop.publish_and_await(20)
            place = f"redis.popped:{chance.randint(1, 12)}"
            code, log = shop.billing.doomed(**QUICK, OUTBOX_CRASH_AT=place)
            assert code == -signal.SIGKILL, log[-3_000:]
            # In this order: the relay may be sending some again, which takes them from nowhere to the queue.
            missing = set(shop.missing)
            lost |= missing - Contents(shop, client).held()
        assert len(lost) >= LOSSES // 2
        shop.until_whole(shop.worker())


def test_what_was_in_a_queue_when_it_was_purged_comes_again(
    make_shop: Callable[[str], Shop], rabbitmq_url: str
) -> None:
    """While more is published on and on, and a worker takes what it can get."""
    shop = make_shop(rabbitmq_url)
    lost = 0
    with shop.open():
        worker = shop.worker()
        with shop.publishing("sleep 0.005"):
            while lost < EVENTS:
                shop.until_more_is_handled_and_more_waits()
                lost += shop.lost(shop.purge())
        shop.until_whole(worker)


def test_what_redis_forgot_when_it_was_killed_comes_again(
    make_shop: Callable[[str], Shop], forgetful_redis: LocalRedis
) -> None:
    shop = make_shop(forgetful_redis.url)
    with shop.open(), redis.Redis.from_url(forgetful_redis.url) as client:
        shop.publish_and_await(100)
        assert sorted(Contents(shop, client).queued()) == sorted(shop.published)
        forgetful_redis.kill()
        forgetful_redis.start()
        assert Contents(shop, client).held() == set()
        worker = shop.worker()
        shop.publish(50)
        shop.until_whole(worker)
        assert shop.relay.stats.confirmed == len(shop.published), "it sends nothing again unasked"


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
    lost = 0
    with shop.open(), redis.Redis.from_url(private_redis.url) as client:
        worker = shop.worker()
        while lost < EVENTS:
            shop.publish_and_await(80, "sleep 0.01")
            lost += shop.lost(Contents(shop, client).flush())
        shop.publish(20)
        shop.until_whole(worker)
