"""Kafka, through librdkafka's idempotent producer: every replica in sync has a record before it counts as taken.

A batch is confirmed once the producer has nothing left that was neither taken nor refused, and nothing was refused:
the library counts a record until its report has been handed over, and hands over refusals only. So nothing passes for
taken that was not; a batch may have to wait for one behind it, as there is no count for each. (Reports for every
record, counted in Python, cost a fifth of the time of sending.) Order holds within a producer's life:
it writes each partition in the order of `send`, and no record of it times out by itself (a later one could then pass
it). Instead the first failure, whichever, or the batch's time being up, ends the producer: what it has not sent is
thrown away before anything is sent by the next one. What was on the wire may still arrive: it is sent again all the
same, and the inbox drops one of the two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final
from weakref import WeakMethod

from confluent_kafka import KafkaError, KafkaException, Producer

from outbox.buses.base import Confirmation, OutgoingMessage
from outbox.buses.kafka_record import ID_PLACE, Record, RecordEncoder
from outbox.buses.kafka_settings import KafkaSettings
from outbox.buses.kafka_topics import check_name, create_missing, told, topic_of, topics_of
from outbox.buses.topology import DEFAULT_EXCHANGE, Topology
from outbox.errors import BusError, ConfigurationError

log = logging.getLogger(__name__)

_NOTHING: Final[Mapping[str, int]] = MappingProxyType({})
_DEFAULTS: Final = {
    "client.id": "outbox",
    "linger.ms": 2,  # while there is more to come: whoever waits for a batch has it sent at once
    "compression.type": "lz4",
    # As Java's clients and Debezium do, so that a key is in the same partition whoever wrote it.
    "partitioner": "murmur2_random",
    "queue.buffering.max.kbytes": 262_144,
    "message.max.bytes": 16_000_000,  # bounds memory only: how large a record may be, the topic says
    "log_level": 2,  # what matters comes as an error or in a report
}
# In longer ones the client goes on calling us when a callback has raised, with the exception still set.
_LONGEST_FLUSH: Final = 0.1
_SAFE: Final = {"acks": "all", "enable.idempotence": True, "message.timeout.ms": 0}
_WHAT_TO_DO: Final = {
    KafkaError.MSG_SIZE_TOO_LARGE: "raise max.message.bytes of the topic, and the brokers' replica.fetch.max.bytes",
    KafkaError._UNKNOWN_TOPIC: "make the topic, or leave out create_topics=false in the URL",
    KafkaError.UNKNOWN_TOPIC_OR_PART: "make the topic, or leave out create_topics=false in the URL",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "allow this user to write to the topic",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "allow this user IdempotentWrite on the cluster",
    KafkaError.NOT_ENOUGH_REPLICAS: "bring the missing brokers back, or lower min.insync.replicas",
}


class KafkaBus:
    """A producer, made when it is first used, and made again after an error."""

    def __init__(
        self, url: str, exchange: str = DEFAULT_EXCHANGE, *, timeout: float = 30.0
    ) -> None:
        """*timeout*: seconds for a batch to be confirmed, and for making topics. *url*: see `KafkaSettings`.

        Raises `ConfigurationError` for a URL that cannot be read, and for a property that librdkafka does not know.
        """
        self._settings = KafkaSettings.of(url)
        self._exchange = exchange
        self._timeout = timeout
        self._producer: _Producer | None = None
        self._topics: dict[tuple[str, str | None], str] = {}  # by type and queue
        self._made: set[str] = set()
        self._encoder = RecordEncoder()
        check_name(topic_of(exchange, "x.y"))
        self._open().end("only tried")

    @property
    def unrouted(self) -> Mapping[str, int]:
        """Always empty: a topic keeps what nobody reads."""
        return _NOTHING

    def declare(self, topology: Topology) -> None:
        """Make the service's topic and those of the types that it takes, if the URL allows it, and if they are gone."""
        names = {name for name in topics_of(topology) if not name.startswith("^")}
        self._made -= names
        self._make(names)

    def send(self, batch: Sequence[OutgoingMessage]) -> Confirmation:
        producer = self._ready()
        try:
            records = self._encoder.records(batch, self._topics)
        except KeyError:
            self._find_topics(batch)
            records = self._encoder.records(batch, self._topics)
        producer.produce(records, self._timeout)
        confirmation = _Batch(producer, self._timeout)
        producer.serve(0)
        return confirmation

    def keep_alive(self) -> None:
        if self._producer is not None and self._producer.is_usable:
            self._producer.serve(0)

    def close(self) -> None:
        if self._producer is not None:
            self._producer.end("the bus was closed")
            self._producer = None

    def _ready(self) -> _Producer:
        if self._producer is not None and not self._producer.is_usable:
            self._producer.end()
            self._producer = None
            # A topic may be what failed: deleted, say.
            self._made.clear()
            self._topics.clear()
        if self._producer is None:
            self._producer = self._open()
        return self._producer

    def _open(self) -> _Producer:
        try:
            return _Producer(self._settings)
        except KafkaException as error:
            raise ConfigurationError(
                f"the URL of Kafka at {self._settings.servers}: {told(error)}"
            ) from error

    def _find_topics(self, batch: Sequence[OutgoingMessage]) -> None:
        """Know the topics of *batch*, each made before anything of it is sent: where one cannot be made, nothing is."""
        found = {
            (one.type, one.queue): one.queue or topic_of(self._exchange, one.type) for one in batch
        }
        self._make(set(found.values()))
        self._topics |= found

    def _make(self, topics: set[str]) -> None:
        new = topics - self._made
        if not new:
            return
        if self._settings.create_topics:
            create_missing(self._ready().client, self._settings, new, min(self._timeout, 10))
        self._made |= new


class _Batch:
    """What was produced up to the end of one call of `send`."""

    __slots__ = ("_deadline", "_last", "_producer")

    def __init__(self, producer: _Producer, timeout: float) -> None:
        self._producer = producer
        self._last = producer.produced
        self._deadline = time.monotonic() + timeout

    def wait(self) -> None:
        producer = self._producer
        while producer.taken < self._last and producer.is_usable:
            remaining = self._deadline - time.monotonic()
            producer.flush(max(0.0, min(remaining, _LONGEST_FLUSH)))
            if producer.taken < self._last and remaining <= 0:
                producer.give_up(
                    f"{producer.unconfirmed} records not confirmed in time{producer.last_trouble}"
                )
        if producer.taken < self._last:
            raise producer.error


class _Producer:
    """One life of librdkafka's producer, from its first record to its first failure."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._place = settings.servers
        self._why = ""
        self._trouble: KafkaError | None = None
        self.produced = 0
        self.taken = 0
        """The first so many of those that were produced are with every replica in sync."""
        fixed = {
            **_SAFE,
            "delivery.report.only.error": True,
            "on_delivery": _weakly(self._on_failure),
            "error_cb": _weakly(self._on_error),
        }
        self.client: Any = Producer(settings.client(_DEFAULTS, fixed))
        self._produce: Any = self.client.produce

    @property
    def is_usable(self) -> bool:
        return not self._why

    @property
    def error(self) -> BusError:
        return BusError(f"Kafka at {self._place}: {self._why}")

    @property
    def last_trouble(self) -> str:
        return f" (last heard: {told(self._trouble)})" if self._trouble else ""

    @property
    def unconfirmed(self) -> int:
        return len(self.client)

    def produce(self, records: Iterable[Record], timeout: float) -> None:
        """Queue *records* up; a full queue may take *timeout* seconds to have room. Raises `BusError`."""
        if self._why:
            raise self.error
        deadline = time.monotonic() + timeout
        produce, produced = self._produce, 0
        try:
            for topic, body, key, headers in records:
                while True:
                    try:
                        produce(topic, body, key, headers=headers)
                        break
                    except BufferError:
                        self._make_room(deadline)
                    except KafkaException as error:
                        _, event_id = headers[ID_PLACE]
                        self.failed(error.args[0], topic, f"event {event_id}: ")
                        raise self.error from error
                produced += 1
        finally:
            self.produced += produced

    def _make_room(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self.give_up(f"its queue stayed full{self.last_trouble}")
        else:
            self.serve(0.1)
        if self._why:
            raise self.error

    def serve(self, timeout: float) -> None:
        """Take in what the library has to report; waits for the first of it. Never raises."""
        self._report(self.client.poll, timeout)

    def flush(self, timeout: float) -> None:
        """Have everything sent at once, and take in what is reported until nothing is left. Never raises."""
        self._report(self.client.flush, timeout)

    def _report(self, wait: Callable[[float], object], timeout: float) -> None:
        try:
            wait(timeout)
        except KafkaException as error:
            self.give_up(f"the producer ended: {told(error)}")
        if not self._why and not self.unconfirmed:
            self.taken = self.produced

    def failed(self, error: KafkaError, topic: str, what: str = "") -> None:
        """A record was not taken: with it ends the producer, so that no later one gets ahead of it."""
        hint = _WHAT_TO_DO.get(error.code())
        self.give_up(f"topic {topic!r}: {what}{told(error)}" + (f": {hint}" if hint else ""))

    def give_up(self, why: str) -> None:
        """Send nothing more. The first reason stays."""
        if self._why:
            return
        self._why = why
        self.client.purge(in_queue=True, in_flight=True, blocking=False)

    def end(self, why: str = "") -> None:
        """Give up, and let go of its threads and connections. Not to be called from one of its reports."""
        self.give_up(why)
        self.serve(0)
        self.client = self._produce = None

    def _on_failure(self, error: KafkaError, record: Any) -> None:
        self.failed(error, record.topic())

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self.give_up(f"the producer ended: {told(error)}")
        elif error.code() != KafkaError._ALL_BROKERS_DOWN:  # what came before it says more
            # Most pass by themselves, as the library tries again; what does not ends a batch.
            if self._trouble is None or self._trouble.code() != error.code():
                log.info("Kafka at %s: %s", self._place, told(error))
            self._trouble = error


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """*method* for the library to call, without keeping its object, and so the library's client, alive."""
    reference = WeakMethod(method)

    def call(*arguments: Any) -> None:
        found = reference()
        if found is not None:
            found(*arguments)

    return call
