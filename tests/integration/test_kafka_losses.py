"""What a Kafka that keeps nothing forgets when it is restarted comes again by itself, and has its effect once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient
from sqlalchemy.orm import Session

import outbox
from tests.apps.billing import Placed, registry
from tests.kafka_brokers import KafkaBroker, LocalKafka, records
from tests.kafka_consumers import BillingOnKafka, Process
from tests.workers import eventually

_SOONER = {"BILLING_MISSED_AFTER": "1", "BILLING_DECLARE_EVERY": "1"}
_QUICK = "topic.metadata.refresh.interval.ms=1000"

pytestmark = pytest.mark.timeout(240)


class Shop:
    """A database whose events a relay carries to Kafka, and the service on it that bills them: both as processes."""

    def __init__(self, billing: BillingOnKafka) -> None:
        self.billing = billing
        self.published: list[str] = []

    def consumer(self) -> Process:
        return self.billing.consumer(url=f"{self.billing.url}&{_QUICK}", **_SOONER)

    def publish(self, count: int, do: str = "") -> None:
        orders = [f"o{len(self.published) + number:04}" for number in range(count)]
        with Session(self.billing.engine) as session, session.begin():
            events = [Placed(order=order, do=do) for order in orders]
            outbox.publish_all(session, events, registry=registry)
        self.published += orders

    def until_whole(self) -> None:
        """Every effect once, and nothing missed any more."""

        def whole() -> bool:
            return self.billing.effects == sorted(self.published) and not self.billing.rows(
                "SELECT FROM outbox.awaited UNION ALL SELECT FROM outbox.missed_roll"
            )

        eventually(whole, 120, lambda: (self.missing, self.billing.logs()[-5_000:]))

    @property
    def missing(self) -> list[str]:
        return sorted(set(self.published) - set(self.billing.effects))


@pytest.fixture
def shop(migrated_database_url: str, private_kafka: LocalKafka, tmp_path: Path) -> Iterator[Shop]:
    billing = BillingOnKafka(migrated_database_url, KafkaBroker(private_kafka.url), tmp_path)
    yield Shop(billing)
    billing.close()


def test_a_consumer_makes_its_topics_again_though_nobody_sends(
    shop: Shop, private_kafka: LocalKafka
) -> None:
    """What is asked for comes to its own topic, which nobody else would make."""
    shop.consumer()
    private_kafka.kill()
    private_kafka.start()
    client = AdminClient({"bootstrap.servers": private_kafka.servers})
    wanted = {shop.billing.queue, shop.billing.topic}
    eventually(lambda: wanted <= client.list_topics(timeout=10).topics.keys(), 30)


def test_what_a_kafka_forgot_comes_again_though_relay_and_consumer_were_killed(
    shop: Shop, private_kafka: LocalKafka
) -> None:
    relay, consumer = shop.billing.relay(), shop.consumer()
    shop.publish(200, "sleep 0.01")
    eventually(lambda: len(shop.billing.effects) > 50, 30, shop.billing.logs)
    consumer.kill()
    shop.publish(100)
    records(private_kafka.servers, shop.billing.topic, 300)
    relay.kill()
    assert len(shop.missing) >= 100
    private_kafka.kill()
    private_kafka.start()
    # Anew: Tansu gives the same producer ids out again, and what one sends that lived on can pass for sent before.
    shop.billing.relay()
    shop.consumer()
    shop.publish(50)
    shop.until_whole()
