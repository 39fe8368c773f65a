"""Which topic an event goes to, and how topics come to be.

One topic per exchange and aggregate: `order.created` and `order.cancelled` on the exchange `events` share the topic
`events.order`. So what happened to one order stays in one partition of one topic, in its order; Debezium's outbox
router does the same. A service that takes only some of the types passes over the rest. What is meant for one service
alone (retries, timers, redrives) goes to a topic named as its queue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from outbox.buses.kafka_settings import KafkaSettings
from outbox.buses.topology import Topology
from outbox.errors import BusError, ConfigurationError

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
_LARGEST_MESSAGE: Final = 2_097_152
"""A topic made here takes every event that `publish` lets through; Kafka's default is a little less than that."""


def topic_of(exchange: str, event_type: str) -> str:
    """The topic of events of that type."""
    return f"{exchange}.{event_type.rpartition('.')[0] or event_type}"


def topics_of(topology: Topology) -> list[str]:
    """What a service reads: its own topic and those of the types that it takes.

    With `*` or `#` in a binding, a regular expression in librdkafka's manner, which begins with `^`. Raises
    `ConfigurationError` for a name that no topic can have.
    """
    found = {topology.queue: None}
    for binding in topology.bindings:
        if "*" in binding or "#" in binding:
            found["^" + re.escape(topology.exchange) + r"\..*$"] = None
        else:
            found[topic_of(topology.exchange, binding)] = None
    for name in found:
        if not name.startswith("^"):
            check_name(name)
    return list(found)


def check_name(name: str) -> None:
    """Raise `ConfigurationError` for a name that no topic can have."""
    if not _NAME.fullmatch(name) or name in {".", ".."}:
        raise ConfigurationError(
            f"{name!r} can be no topic on Kafka: letters, digits and . _ -, at most 249; "
            "rename the exchange or the queue"
        )


def create_missing(
    client: Any, settings: KafkaSettings, names: Iterable[str], timeout: float
) -> None:
    """Make those topics of *names* that are not there. *client*: asks for what is there. Raises `BusError`."""
    try:
        # All topics: to ask for one by its name can make it, with the broker's one partition.
        there = client.list_topics(timeout=timeout).topics
        missing = sorted(set(names) - there.keys())
        if missing:
            _create(settings, missing, timeout)
    except KafkaException as error:
        raise BusError(f"Kafka at {settings.servers}: {told(error)}") from error


def _create(settings: KafkaSettings, names: list[str], timeout: float) -> None:
    topics = [
        NewTopic(
            name,
            num_partitions=settings.partitions,
            replication_factor=settings.replication,
            config={"max.message.bytes": str(_LARGEST_MESSAGE)},
        )
        for name in names
    ]
    admin = AdminClient(settings.client({"log_level": 2}))
    for name, made in admin.create_topics(topics, request_timeout=timeout).items():
        try:
            made.result(timeout + 5)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise BusError(
                    f"topic {name!r} is not there and could not be made on Kafka at {settings.servers}: {told(error)}; "
                    "allow it, or make the topics yourself and add create_topics=false to the URL"
                ) from error


def told(error: KafkaException | KafkaError) -> str:
    """What the client library has to say, for people."""
    inner = error.args[0] if isinstance(error, KafkaException) and error.args else error
    return inner.str() if isinstance(inner, KafkaError) else str(inner)
