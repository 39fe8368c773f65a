"""How a worker sends to the service's own queue: retries, timers and redrives, by the worker's own transport."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kombu.transport.virtual.base import BrokerState

from outbox.addressing import asking_message, delivery_message
from outbox.buses.base import OutgoingMessage
from outbox.buses.message import celery_message
from outbox.pending import PendingDelivery

if TYPE_CHECKING:
    from celery import Celery
    from kombu import Queue

log = logging.getLogger(__name__)


class OwnQueue:
    """Sends over one connection of its own, which is made anew after an error. For one thread."""

    def __init__(self, app: Celery, queue: Queue) -> None:
        self._app = app
        self._queue = queue
        self._producer: Any = None
        self._pusher: Any = None

    def __call__(self, batch: Sequence[PendingDelivery]) -> None:
        """Send owed deliveries. Raises if the broker did not take them all."""
        messages = [delivery_message(owed, self._queue.name) for owed in batch]
        with self._connected() as producer:
            if self._pusher is not None:
                self._pusher.push(producer.channel, self._queue.name, messages)
            else:
                for message in messages:
                    _publish(producer, message)

    def send_to(self, queue: str, body: bytes) -> None:
        """Send one message between relays and workers to any queue. Raises if the broker did not take it."""
        with self._connected() as producer:
            _publish(producer, asking_message(body, queue))

    def declare(self) -> None:
        """Make the queue and its bindings, where the broker has lost them. Raises if it cannot."""
        with self._connected() as producer:
            state = getattr(producer.channel, "state", None)
            if isinstance(state, BrokerState):
                state.clear()  # kombu's own notes of what it has bound: it would not bind that again
            self._queue(producer.channel).declare()

    def close(self) -> None:
        if self._producer is not None:
            connection, self._producer = self._producer.connection, None
            try:
                connection.release()
            except Exception as error:
                log.debug("closing the sweeper's connection: %r", error)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        try:
            if self._producer is None:
                self._connect()
            yield self._producer
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        # Confirmed, so that a dead connection is noticed now and not when the row is due again.
        options = {**self._app.conf.broker_transport_options, "confirm_publish": True}
        connection = self._app.connection_for_write(transport_options=options)
        self._producer = connection.Producer(auto_declare=False)
        self._pusher = None
        if connection.transport.driver_type == "redis":
            from outbox.celery.redis_pushing import Pusher

            self._pusher = Pusher()


def _publish(producer: Any, outgoing: OutgoingMessage) -> None:
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
