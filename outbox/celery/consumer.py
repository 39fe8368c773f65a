"""A worker's consumer that loses nothing it cannot read.

Celery acknowledges a body that it cannot decode, and discards a message for a task it does not
know. Here each of them goes the way of an event, through the pool into the quarantine table, and is
acknowledged once it is there. While the database is away it goes back to the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from celery import signals
from celery.worker import state
from celery.worker.consumer import Consumer as CeleryConsumer
from vine import promise

from outbox.celery.closing import await_acceptance
from outbox.celery.hub import stay_awake
from outbox.celery.installation import installed
from outbox.celery.raw import REFUSED
from outbox.celery.redis import reading_anything
from outbox.celery.redis_taking import taking
from outbox.celery.task import BATCH_TASK_NAME, TASK_NAME

log = logging.getLogger(__name__)

_WRONG_SHAPE: Final = (AttributeError, KeyError, TypeError, ValueError)


class Consumer(CeleryConsumer):
    """Set as `worker_consumer` by `outbox.celery.setup`."""

    strategies: dict[str, Callable[..., None]]
    on_task_message: set[Callable[..., None]]

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        installation = installed(self.app)
        queue, size = installation.service.queue, installation.batch_size
        return self.ensure_connected(adapted(connection, queue, size))

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        stay_awake(hub)

    def on_close(self) -> None:
        stopping: object = state.should_stop
        if stopping is not None:
            await_acceptance(self.pool)
        super().on_close()

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **options)

        def on_task_received(message: Any) -> None:
            refusal = self._refusal(message)
            if refusal is not None:
                self._keep(message, refusal)
                return
            try:
                handle(message)
            except _WRONG_SHAPE as error:
                # Headers that Celery did not expect. Raised further, it would end the worker, or
                # pass for a lost connection (kombu counts KeyError as one on Redis), for ever.
                if message.acknowledged:
                    raise
                self._keep(message, f"Celery could not take it in: {error!r}")

        return on_task_received

    def _refusal(self, message: Any) -> str | None:
        name = message.headers.get("task") if isinstance(message.headers, dict) else None
        if not isinstance(name, str):
            return "it names no task"
        if name == BATCH_TASK_NAME or name not in self.strategies:
            return f"it names the task {name[:200]!r}, unknown here"
        return None

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._keep(message, f"its body could not be decoded: {exc}")

    def on_unknown_message(self, _body: object, message: Any) -> None:
        self._keep(message, "it is no Celery message")
        signals.task_rejected.send(sender=self, message=message, exc=None)

    def on_unknown_task(self, _body: object, message: Any, exc: Exception) -> None:
        self._keep(message, f"it names the task {exc}, unknown here")
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=str(exc), id=None)

    def on_invalid_task(self, _body: object, message: Any, exc: Exception) -> None:
        self._keep(message, f"it is no valid Celery message: {exc}")
        signals.task_rejected.send(sender=self, message=message, exc=exc)

    def _keep(self, message: Any, reason: str) -> None:
        setattr(message, REFUSED, reason)
        # In Celery 5.6 acks from the pool are called soon; later releases know better.
        call_soon = getattr(self, "call_soon_ack", self.call_soon)
        self.strategies[TASK_NAME](
            message,
            None,
            promise(call_soon, (message.ack_log_error,)),
            promise(call_soon, (message.reject_log_error,)),
            self.on_task_message,
        )


def adapted(connection: Any, queue: str, batch_size: int) -> Any:
    """Make *connection*, not yet open, read anything from Redis and take up to *batch_size* messages
    of *queue* at once. Other brokers: unchanged."""
    create_transport = connection.create_transport

    def create() -> Any:
        transport = create_transport()
        if getattr(transport, "driver_type", None) == "redis":
            transport.Channel = taking(reading_anything(transport.Channel), queue, batch_size)
        return transport

    connection.create_transport = create
    return connection
