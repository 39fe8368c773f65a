"""How the worker takes an event's message in: raw, and without what Celery would act upon.

The body goes to the task as the bytes it came in. Of the headers only what identifies and traces
is kept: a foreign `eta` would hold the message in memory, `expires` would drop it, and callbacks in
the body would run any task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4, uuid5

from celery.worker.request import Request
from celery.worker.strategy import default as celery_strategy

if TYPE_CHECKING:
    from celery import Celery, Task
    from kombu import Message

log = logging.getLogger(__name__)

REFUSED: Final = "outbox_refused"
"""Attribute of a message: why it cannot be an event, found out by the consumer."""

_TRACING: Final = ("traceparent", "tracestate", "baggage", "sentry-trace")
_MAX_TEXT = 500
_MAX_HEADERS = 50


def strategy(task: Task[Any, Any], app: Celery, consumer: Any, **options: Any) -> Any:
    """Celery's own strategy, given each message as `RawMessage`."""
    handle = celery_strategy(task, app, consumer, **options)
    service = task.receiving.service.name  # type: ignore[attr-defined]

    def take_in(
        message: Message,
        _: object,
        ack: Callable[..., Any],
        reject: Callable[..., Any],
        callbacks: Any,
    ) -> None:
        handle(RawMessage(message, task.name, service), None, ack, reject, callbacks)

    return take_in


class RawMessage:
    """What Celery's strategy and request read of a message, with the body left as it is."""

    content_type = None
    content_encoding = None

    def __init__(self, message: Message, task_name: str, service: str) -> None:
        came_with = message.headers if isinstance(message.headers, Mapping) else {}
        came_by = message.delivery_info if isinstance(message.delivery_info, Mapping) else {}
        self.original = message
        self.headers = _identity(came_with, task_name, service)
        self.properties: dict[str, Any] = {}
        self.delivery_info = {
            "exchange": _text(came_by.get("exchange")),
            "routing_key": _text(came_by.get("routing_key")),
            "redelivered": bool(came_by.get("redelivered") or came_with.get("redelivered")),
        }
        wire = {
            "content_type": _text(message.content_type) or None,
            "refused": getattr(message, REFUSED, None),
            "headers": {
                **_bounded(came_with),
                "content_type": _text(message.content_type),
                "exchange": self.delivery_info["exchange"],
                "routing_key": self.delivery_info["routing_key"],
            },
        }
        arguments: tuple[bytes] = (_as_bytes(message.body),)
        self.payload = self.body = (arguments, {"wire": wire}, dict[str, Any]())


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


def _identity(headers: Mapping[str, Any], task_name: str, service: str) -> dict[str, Any]:
    """Who it is, to logs, Flower and tracing: an id per consuming service, the event its root."""
    event_id = _uuid(headers.get("id"))
    shadow = _text(headers.get("shadow"))
    identity = {
        "lang": "py",
        "task": task_name,
        "id": str(uuid4() if event_id is None else uuid5(event_id, service)),
        "root_id": None if event_id is None else str(event_id),
        "parent_id": None if event_id is None else str(event_id),
        "shadow": f"{service}:{shadow}" if shadow else task_name,
        "origin": _text(headers.get("origin")),
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "retries": 0,
        "ignore_result": True,
    }
    identity |= {name: _text(headers[name]) for name in _TRACING if headers.get(name)}
    return identity


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _text(value: object) -> str:
    """*value*, if it is a text that can stand in a log line."""
    if not isinstance(value, str) or not value.isprintable():
        return ""
    return value[:_MAX_TEXT]


def _bounded(headers: Mapping[Any, Any]) -> dict[str, Any]:
    kept = list(headers.items())[:_MAX_HEADERS]
    return {
        str(name)[:_MAX_TEXT]: value
        if isinstance(value, int | float | None)
        else str(value)[:_MAX_TEXT]
        for name, value in kept
    }


def _as_bytes(body: object) -> bytes:
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    if isinstance(body, str):
        return body.encode("utf-8", "surrogatepass")
    return b"" if body is None else repr(body).encode()
