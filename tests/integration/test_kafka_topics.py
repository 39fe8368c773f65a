"""Making topics: what the mock cluster cannot do is played here, and done for real where there is a broker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from outbox.buses import OutgoingMessage, Topology, kafka_topics
from outbox.buses.kafka import KafkaBus
from outbox.buses.kafka_settings import KafkaSettings
from outbox.buses.kafka_topics import create_missing
from outbox.errors import BusError
from outbox.ids import new_id
from tests import containers
from tests.mock_kafka import records

SETTINGS = KafkaSettings.of("kafka://one,two:9093/?partitions=12&replication=3")


class Cluster:
    """What the client says is there, and an administrator that answers as told."""

    def __init__(self, there: set[str], answer: KafkaError | None) -> None:
        self.there, self._answer = there, answer
        self.made: list[Any] = []

    def list_topics(self, timeout: float) -> Any:
        return SimpleNamespace(topics=dict.fromkeys(self.there))

    def create_topics(self, topics: list[Any], **_: Any) -> dict[str, Future[None]]:
        self.made += topics
        futures = {}
        for topic in topics:
            futures[topic.topic] = made = Future[None]()
            if self._answer is None:
                made.set_result(None)
            else:
                made.set_exception(KafkaException(self._answer))
        return futures


def cluster(monkeypatch: pytest.MonkeyPatch, answer: int | None, *there: str) -> Cluster:
    made = Cluster(set(there), None if answer is None else KafkaError(answer))
    monkeypatch.setattr(kafka_topics, "AdminClient", lambda _: made)
    return made


def test_only_missing_topics_are_made_as_the_url_says(monkeypatch: pytest.MonkeyPatch) -> None:
    there = cluster(monkeypatch, None, "events.order")
    create_missing(there, SETTINGS, ["events.order", "events.stock"], 1)
    (made,) = there.made
    assert (made.topic, made.num_partitions, made.replication_factor) == ("events.stock", 12, 3)
    create_missing(there, SETTINGS, ["events.order"], 1)
    assert len(there.made) == 1


def test_a_topic_that_somebody_else_makes_meanwhile_is_fine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create_missing(cluster(monkeypatch, KafkaError.TOPIC_ALREADY_EXISTS), SETTINGS, ["t"], 1)


def test_a_topic_that_may_not_be_made_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing = cluster(monkeypatch, KafkaError.TOPIC_AUTHORIZATION_FAILED)
    with pytest.raises(BusError, match=r"topic 't' .*one:9092,two:9093.* add create_topics=false"):
        create_missing(refusing, SETTINGS, ["t"], 1)


# ---- a real broker: OUTBOX_TEST_KAFKA_URL, or an image on the Docker daemon ----


@pytest.fixture(scope="module")
def broker_url() -> Iterator[str]:
    given = os.environ.get("OUTBOX_TEST_KAFKA_URL")
    if given:
        yield given
        return
    image = os.environ.get("OUTBOX_TEST_KAFKA_IMAGE")
    reason = (
        containers._why_no_docker()
        if image
        else "neither OUTBOX_TEST_KAFKA_URL nor OUTBOX_TEST_KAFKA_IMAGE is set"
    )
    if image is None or reason is not None:
        pytest.skip(f"no Kafka: {reason}")
    from testcontainers.community.kafka import KafkaContainer

    with KafkaContainer(image) as container:
        yield f"kafka://{container.get_bootstrap_server()}"


def test_a_real_broker_has_the_topics_and_takes_the_largest_event(
    broker_url: str, unique_name: str
) -> None:
    bus = KafkaBus(f"{broker_url}/?partitions=3&compression.type=none", unique_name)
    queue = f"{unique_name}.events"
    bus.declare(Topology(queue, ("order.created",), unique_name))
    there = AdminClient(KafkaSettings.of(broker_url).client()).list_topics(timeout=10).topics
    assert [len(there[name].partitions) for name in (queue, f"{unique_name}.order")] == [3, 3]
    largest = b'{"x":"' + b"y" * 1_048_568 + b'"}'
    bus.send([OutgoingMessage(str(new_id()), "order.created", "k", largest, 0, 1)]).wait()
    servers = KafkaSettings.of(broker_url).servers
    assert records(servers, f"{unique_name}.order", 1)[0].value() == largest
    bus.close()
