"""Does this Kafka keep what it was given, and has it our topics? Told from its metadata alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from outbox.doctor.finding import Finding, Level
from outbox.errors import ConfigurationError

_COPIES: Final = 2
"""With fewer copies of a record, one lost disk is a lost event."""


def examine_kafka(
    url: str, exchange: str, queues: Iterable[str], timeout: float
) -> Iterator[Finding]:
    """Make all checks; one finding only where no broker answers. Makes no topics."""
    try:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        from outbox.buses.kafka_settings import KafkaSettings
    except ModuleNotFoundError as error:
        yield _unreachable(
            f"it needs the package {error.name!r}", "pip install 'outbox-saga[kafka]'"
        )
        return
    try:
        client = AdminClient(KafkaSettings.of(url).client({"log_level": 2}))
        # All of them: to ask for one by its name can make it.
        metadata = client.list_topics(timeout=timeout)
    except (KafkaException, ConfigurationError) as error:
        said = error.args[0]
        yield _unreachable(said if isinstance(said, str) else said.str())
        return
    count = len(metadata.brokers)
    yield Finding("broker reachable", Level.OK, f"Kafka, {count} broker{'s' * (count != 1)}", "")
    for queue in queues:
        yield _own_topic(queue, metadata.topics)
    ours = {name: one for name, one in metadata.topics.items() if name.startswith(f"{exchange}.")}
    yield _copies({**ours, **{q: metadata.topics[q] for q in queues if q in metadata.topics}})


def _unreachable(reason: str, fix: str = "check the URL, the network, the user") -> Finding:
    return Finding("broker reachable", Level.FAIL, reason, fix)


def _own_topic(queue: str, topics: dict[str, Any]) -> Finding:
    check = f"topic {queue}"
    if queue not in topics:
        fix = "start the service's consumer, which makes it, or make it yourself"
        return Finding(check, Level.WARN, "it is not there", fix)
    return Finding(check, Level.OK, f"{len(topics[queue].partitions)} partitions", "")


def _copies(topics: dict[str, Any]) -> Finding:
    check = "copies of topics"
    if not topics:
        return Finding(check, Level.OK, "no topics yet", "")
    partitions = [one for topic in topics.values() for one in topic.partitions.values()]
    fewest = min((len(one.replicas) for one in partitions), default=0)
    behind = sum(len(one.isrs) < len(one.replicas) for one in partitions)
    if behind:
        return Finding(
            check,
            Level.WARN,
            f"{behind} partitions lack a replica in sync",
            "bring the missing brokers back",
        )
    if fewest < _COPIES:
        return Finding(
            check, Level.WARN, f"some of {len(topics)} topics have {fewest} copy of a record",
            "raise their replication factor to 3 and min.insync.replicas to 2; replication=3 in the URL for new ones",
        )  # fmt: skip
    return Finding(check, Level.OK, f"{len(topics)} topics, at least {fewest} copies each", "")
