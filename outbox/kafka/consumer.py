"""A service's consumer: one member of its group on Kafka, and the sweeper beside it.

At least once: an offset is committed only after everything below it is settled in the service's database (see
`outbox.kafka.partition`), by hand, about every second. What comes twice the inbox drops. The thread that runs the
consumer only fetches, pauses and commits; handlers run in others. So a handler that takes long does not cost the
membership in the group, and a rebalance waits for the record in hand but for nothing behind it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException
from sqlalchemy import URL, Engine

from outbox import idle_keys, inbox_partitions
from outbox.bell import Bell
from outbox.buses.kafka import KafkaBus
from outbox.buses.kafka_settings import KafkaSettings
from outbox.buses.kafka_topics import told, topics_of
from outbox.buses.topology import Topology
from outbox.celery.engines import ForkSafeEngine
from outbox.celery.sweeping import Look, check_schema
from outbox.errors import BusError, ConfigurationError
from outbox.kafka.assignment import Assignment
from outbox.kafka.own_topic import OwnTopic
from outbox.kafka.partition import Receive
from outbox.kafka.record import RecordReceiver
from outbox.receive import Receipt, Receiver, ReceiveSettings
from outbox.service import Service
from outbox.sweeper import Sweeper, SweepSettings
from outbox.vigil import Vigil

log = logging.getLogger(__name__)

_LOOK_EVERY: Final = 0.05
_AT_A_TIME: Final = 500
_DEFAULTS: Final = {
    "client.id": "outbox",
    # A service that is new, or was away for longer than the group remembers, begins with the oldest there is.
    "auto.offset.reset": "earliest",
    "partition.assignment.strategy": "cooperative-sticky",
    "session.timeout.ms": 10_000,
    "topic.metadata.refresh.interval.ms": 30_000,
    "queued.max.messages.kbytes": 16_384,
    "log_level": 2,
}
_SAFE: Final = {"enable.auto.commit": False, "enable.auto.offset.store": False}


@dataclass(frozen=True)
class ConsumerSettings:
    """How a consumer consumes."""

    concurrency: int = 1
    """Partitions that are worked on at a time, each in a thread."""
    batch: int = 1
    """Events of a partition that may be handled in one transaction, if so many wait."""
    commit_every: float = 1.0
    """Seconds between two commits of offsets."""
    patience: float = 25.0
    """Seconds that a record in hand is waited for when its partition goes elsewhere, or the process ends."""


@dataclass
class ConsumerStats:
    """What a consumer has done since it was started."""

    received: int = 0
    passed_over: int = 0
    """Records of types that the service does not take."""


class Consumer:
    """One member of a service's group. Any number may run, at most as many as there are partitions do something."""

    def __init__(
        self,
        service: Service,
        broker_url: str,
        *,
        database_url: str | URL | None = None,
        engine: Engine | None = None,
        settings: ReceiveSettings | None = None,
        sweep: SweepSettings | None = None,
        consuming: ConsumerSettings | None = None,
    ) -> None:
        """Connects when run. Either *database_url* or *engine*. Raises `ConfigurationError`."""
        database = engine if engine is not None else database_url
        if database is None or (engine is not None and database_url is not None):
            raise ConfigurationError("a consumer needs either database_url or engine")
        if not broker_url.strip().lower().startswith("kafka://"):
            raise ConfigurationError(
                "a consumer reads from kafka://...; on RabbitMQ and Redis, Celery workers do it: "
                "outbox.celery.setup() and `celery worker`"
            )
        if not service.bindings:
            raise ConfigurationError(
                f"service {service.name} subscribes to nothing: no handler of it takes an event"
            )
        self._service = service
        self._topology = Topology.of(service)
        self._topics = topics_of(self._topology)
        self._kafka = KafkaSettings.of(broker_url)
        self._bus = KafkaBus(broker_url, service.exchange)
        self._receive_settings = settings or ReceiveSettings()
        self._sweep_settings = sweep or SweepSettings()
        self._settings = consuming or ConsumerSettings()
        self._engine = ForkSafeEngine(database, name=f"outbox {service.name}")
        self._bell = Bell()
        self._stopping = threading.Event()
        self.stats = ConsumerStats()

    def stop(self) -> None:
        """Let `run` end: the record in hand is settled, offsets are committed, the partitions given back."""
        self._stopping.set()

    def run(self) -> None:
        """Consume until `stop` is called. What fails is logged and tried again. Raises `ConfigurationError`."""
        check_schema(self._engine, self._service.schema)
        self._declare()
        own_topic = OwnTopic(self._bus, self._service.queue)
        sweeper = Sweeper(
            self._service.name,
            self._engine,
            own_topic,
            schema=self._service.schema,
            settings=self._sweep_settings,
            chores=self._keep_up,
            bell=self._bell,
            look=Look(
                Vigil(
                    self._service,
                    self._engine,
                    own_topic.send_to,
                    patience=self._receive_settings.missed_after,
                ),
                partial(self._bus.declare, self._topology),
                self._sweep_settings.declare_every,
            ),
        )
        sweeper.start()
        try:
            while not self._stopping.is_set():
                try:
                    self._consume()
                except KafkaException as error:
                    log.error("%s; joining the group again", told(error))
                    self._stopping.wait(1)
        finally:
            sweeper.stop()
            self._bus.close()
            self._bell.close()

    def _declare(self) -> None:
        while not self._stopping.is_set():
            try:
                self._bus.declare(self._topology)
                return
            except BusError as error:
                log.warning("%s; trying again", error)
                self._stopping.wait(1)

    def _keep_up(self) -> None:
        window = self._receive_settings.dedupe_window
        inbox_partitions.maintain(self._engine(), window=window, schema=self._service.schema)
        idle_keys.forget(self._engine(), window=window, schema=self._service.schema)
        self._service.keep_up(self._engine(), window)

    def _consume(self) -> None:
        """One life of the library's client. Raises `KafkaException` where it cannot go on."""
        receiver = Receiver(
            self._service, self._engine, self._receive_settings, on_due=self._bell.ring
        )
        receive = partial(self._receive, RecordReceiver(receiver).receive)
        assignment = Assignment(receive, self._settings.concurrency, self._settings.batch)
        client = self._open()
        try:
            client.subscribe(
                self._topics,
                on_assign=lambda _, partitions: assignment.add(partitions),
                on_revoke=lambda _, partitions: assignment.remove(
                    client, partitions, self._settings.patience
                ),
                on_lost=lambda _, partitions: assignment.forget(partitions),
            )
            log.info("consuming %s as %s", ", ".join(self._topics), self._service.name)
            self._fetch(client, assignment)
        finally:
            assignment.remove(client, assignment.everything, self._settings.patience)
            assignment.close()
            client.close()

    def _open(self) -> Any:
        try:
            return Client(self._kafka.client(_DEFAULTS, {**_SAFE, "group.id": self._service.name}))
        except KafkaException as error:
            raise ConfigurationError(
                f"the URL of Kafka at {self._kafka.servers}: {told(error)}"
            ) from error

    def _fetch(self, client: Any, assignment: Assignment) -> None:
        committed_at = time.monotonic()
        while not self._stopping.is_set():
            self._take(client, assignment)
            assignment.pause_and_resume(client)
            if time.monotonic() - committed_at >= self._settings.commit_every:
                assignment.commit(client)
                committed_at = time.monotonic()

    def _take(self, client: Any, assignment: Assignment) -> None:
        # One by one: partitions may come and go inside of a call, and a record that was fetched
        # before that would then seem to be the first one of a partition that is new.
        timeout = _LOOK_EVERY
        for _ in range(_AT_A_TIME):
            record = client.poll(timeout)
            if record is None:
                return
            if record.error() is None:
                self.stats.received += 1
                assignment.take(record)
            else:
                self._note(record.error())
            timeout = 0

    def _note(self, error: KafkaError) -> None:
        if error.fatal():
            raise KafkaException(error)
        log.warning("Kafka at %s: %s", self._kafka.servers, told(error))

    def _receive(
        self, receive: Receive, records: Sequence[Any], *, redelivered: bool
    ) -> list[Receipt | None]:
        receipts = receive(records, redelivered=redelivered)
        self.stats.passed_over += receipts.count(None)
        return receipts
