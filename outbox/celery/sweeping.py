"""The sweeper as a part of the worker, and how it sends to the service's own queue."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from sqlalchemy.exc import DBAPIError

from outbox import inbox_partitions, rolls, schema
from outbox.buses.base import OutgoingMessage
from outbox.buses.message import celery_message
from outbox.celery.engines import ForkSafeEngine
from outbox.celery.installation import installed
from outbox.ids import new_id
from outbox.pending import PendingDelivery
from outbox.service import Service
from outbox.sweeper import Sweeper
from outbox.vigil import Vigil

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)


class OwnQueue:
    """Sends owed deliveries to the service's own queue, over one connection of its own."""

    def __init__(self, app: Celery, queue: str) -> None:
        self._app = app
        self._queue = queue
        self._producer: Any = None

    def __call__(self, batch: Sequence[PendingDelivery]) -> None:
        """Raises if the broker did not take them all; the connection is then made anew."""
        try:
            producer = self._producer or self._connect()
            for owed in batch:
                self._publish(producer, owed)
        except Exception:
            self.close()
            raise

    def send_to(self, queue: str, body: bytes) -> None:
        """Send one message between relays and workers to any queue. Raises if the broker did not take it."""
        try:
            message = OutgoingMessage(new_id(), rolls.ASK, None, body, 0, 0, queue=queue)
            self._publish_message(self._producer or self._connect(), message)
        except Exception:
            self.close()
            raise

    def declare(self, queue: Any) -> None:
        """Make the service's queue and its bindings, where the broker has lost them. Raises if it cannot."""
        try:
            queue((self._producer or self._connect()).channel).declare()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        if self._producer is not None:
            connection, self._producer = self._producer.connection, None
            try:
                connection.release()
            except Exception as error:
                log.debug("closing the sweeper's connection: %r", error)

    def _connect(self) -> Any:
        # Confirmed, so that a dead connection is noticed now and not when the row is due again.
        options = {**self._app.conf.broker_transport_options, "confirm_publish": True}
        connection = self._app.connection_for_write(transport_options=options)
        self._producer = connection.Producer(auto_declare=False)
        return self._producer

    def _publish(self, producer: Any, owed: PendingDelivery) -> None:
        message = OutgoingMessage(
            event_id=owed.event_id,
            type=owed.type,
            key=owed.key,
            body=owed.body,
            lane=0,
            position=0,
            key_seq=owed.key_seq,
            queue=self._queue,
            handler=owed.handler,
        )
        self._publish_message(producer, message)

    @staticmethod
    def _publish_message(producer: Any, outgoing: OutgoingMessage) -> None:
        message = celery_message(outgoing)
        producer.publish(
            message.body,
            exchange="",
            routing_key=outgoing.queue,
            headers=message.headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            delivery_mode=2,
            retry=False,
            timeout=10,
            confirm_timeout=30,
        )


class _Look:
    """What the sweeper looks after beside what is due."""

    def __init__(self, vigil: Vigil, declare: Callable[[], None], every: timedelta) -> None:
        self._vigil = vigil
        self._declare = declare
        self._every = every.total_seconds()
        self._declare_at = time.monotonic() + self._every

    def __call__(self) -> None:
        self._vigil.look()
        now = time.monotonic()
        if now >= self._declare_at:
            self._declare_at = now + self._every
            self._declare()


class SweeperStep(bootsteps.StartStopStep):
    """Runs the sweeper in the worker's main process, from when its pool has started."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._sweeper: Sweeper | None = None
        self._queue: OwnQueue | None = None

    def start(self, worker: Any) -> None:
        installation = installed(worker.app)
        service = installation.service
        if service.queue not in worker.app.amqp.queues.consume_from:
            return
        engine = ForkSafeEngine(installation.database, name=f"outbox sweeper {service.name}")
        check_schema(engine, service.schema)
        window = installation.settings.dedupe_window
        self._queue = OwnQueue(worker.app, service.queue)
        self._sweeper = Sweeper(
            service.name,
            engine,
            self._queue,
            schema=service.schema,
            settings=installation.sweep,
            chores=partial(_keep_up, engine, service, window),
            bell=installation.bell,
            look=_Look(
                Vigil(
                    service,
                    engine,
                    self._queue.send_to,
                    patience=installation.settings.missed_after,
                ),
                partial(self._queue.declare, installation.queue),
                installation.sweep.declare_every,
            ),
        )
        self._sweeper.start()

    def stop(self, _worker: Any) -> None:
        sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.stop()
        if self._queue is not None:
            self._queue.close()

    def terminate(self, worker: Any) -> None:
        self.stop(worker)


def check_schema(engine: ForkSafeEngine, name: str) -> None:
    """Raise `SchemaError` unless the tables fit this release. A database that is away is no error."""
    try:
        with engine().connect() as connection:
            schema.check(connection, name)
    except DBAPIError as error:
        log.warning("could not check the tables in schema %s yet: %s", name, error)


def _keep_up(engine: ForkSafeEngine, service: Service, window: timedelta) -> None:
    inbox_partitions.maintain(engine(), window=window, schema=service.schema)
    service.keep_up(engine(), window)
