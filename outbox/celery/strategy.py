"""How the worker takes events' messages in, and when it acknowledges them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.worker.request import Request
from celery.worker.strategy import default as celery_strategy

from outbox.celery.batching import Collector, Settle
from outbox.celery.installation import installed
from outbox.celery.raw import RawMessage
from outbox.celery.task import BATCH_TASK_NAME

if TYPE_CHECKING:
    from celery import Celery, Task
    from kombu import Message


def strategy(task: Task[Any, Any], app: Celery, consumer: Any, **options: Any) -> Any:
    """Celery's own strategy, given each message as `RawMessage`, or several as one `RawBatch`."""
    installation = installed(app)
    service = installation.service.name
    handle = celery_strategy(task, app, consumer, **options)
    if installation.batch_size > 1:
        batch_task = app.tasks[BATCH_TASK_NAME]
        return Collector(
            installation.batch_size,
            consumer.controller.concurrency or 1,
            consumer.timer,
            service,
            call_soon=getattr(consumer, "call_soon_ack", consumer.call_soon),
            hand_over=handle,
            hand_over_batch=celery_strategy(batch_task, app, consumer, **options),
        ).take_in

    def take_in(message: Message, _: object, ack: Settle, reject: Settle, callbacks: Any) -> None:
        handle(RawMessage(message, task.name, service), None, ack, reject, callbacks)

    return take_in


class EventRequest(Request):
    """A request that is acknowledged only when its task has returned: then it is settled.

    Celery acknowledges what was revoked, killed by `terminate`, or raised an error outside the
    task's own code; each of these goes back to the queue instead.
    """

    _is_unsettled = False

    def revoked(self) -> bool:
        return False

    def on_failure(self, *args: Any, **options: Any) -> Any:
        self._is_unsettled = True
        return super().on_failure(*args, **options)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        self._is_unsettled = not soft
        super().on_timeout(soft, timeout)

    def _announce_revoked(self, *args: Any) -> None:
        self._is_unsettled = True
        super()._announce_revoked(*args)  # type: ignore[misc]

    def acknowledge(self) -> None:
        if self._is_unsettled:
            self.reject()
        else:
            super().acknowledge()

    def reject(self, requeue: bool = True) -> None:  # noqa: ARG002 - never anything else
        super().reject(requeue=True)
