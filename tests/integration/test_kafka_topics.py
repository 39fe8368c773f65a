"""Making topics, which the mock cluster cannot do: refusals are played here, and the rest is done on a broker."""

from __future__ import annotations

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
from tests.kafka_brokers import KafkaBroker, LocalKafka, records

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


# ---- on a broker ----


def partitions_of(broker: KafkaBroker | LocalKafka, *topics: str) -> list[int]:
    there = AdminClient({"bootstrap.servers": broker.servers}).list_topics(timeout=10).topics
    return [len(there[name].partitions) for name in topics]


def test_a_broker_has_the_topics_and_takes_the_largest_event(
    kafka_broker: KafkaBroker, unique_name: str
) -> None:
    url = f"kafka://{kafka_broker.servers}/?partitions=3&compression.type=none"
    bus = KafkaBus(url, unique_name)
    queue, topic = f"{unique_name}.events", f"{unique_name}.order"
    bus.declare(Topology(queue, ("order.created",), unique_name))
    assert partitions_of(kafka_broker, queue, topic) == [3, 3]
    largest = b'{"x":"' + b"y" * 1_048_568 + b'"}'
    bus.send([OutgoingMessage(str(new_id()), "order.created", "k", largest, 0, 1)]).wait()
    assert records(kafka_broker.servers, topic, 1)[0].value() == largest
    bus.close()


def test_a_topic_that_came_to_be_after_the_look_is_left_as_it_is(
    kafka_broker: KafkaBroker, unique_name: str
) -> None:
    saw_nothing = Cluster(set(), None)
    for partitions in (3, 5):
        settings = KafkaSettings.of(f"kafka://{kafka_broker.servers}/?partitions={partitions}")
        create_missing(saw_nothing, settings, [unique_name], 10)
    assert partitions_of(kafka_broker, unique_name) == [3]


def test_topics_that_are_gone_are_made_again_when_they_are_declared_again(
    private_kafka: LocalKafka, capfd: pytest.CaptureFixture[str]
) -> None:
    bus = KafkaBus(f"{private_kafka.url}&session.timeout.ms=2500")  # which is for consumers only
    topology = Topology("billing.events", ("order.created",))
    bus.declare(topology)
    private_kafka.kill()
    private_kafka.start()
    bus.declare(topology)
    assert partitions_of(private_kafka, "billing.events", "events.order") == [4, 4]
    bus.close()
    assert "CONFWARN" not in capfd.readouterr().err
