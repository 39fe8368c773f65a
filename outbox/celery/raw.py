"""A message as Celery's strategy is given it: raw, and without what Celery would act upon.

The body goes to the task as the bytes it came in. Of the headers only what identifies and traces
is kept: a foreign `eta` would hold the message in memory, `expires` would drop it, and callbacks in
the body would run any task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4, uuid5

if TYPE_CHECKING:
    from kombu import Message

REFUSED: Final = "outbox_refused"
"""Attribute of a message: why it cannot be an event, found out by the consumer."""

_TRACING: Final = ("traceparent", "tracestate", "baggage", "sentry-trace")
_MAX_TEXT = 500
_NUMBERS: Final = (int, float, type(None))
_MAX_HEADERS = 50


class RawMessage:
    """What Celery's strategy and request read of a message, with the body left as it is."""

    content_type = None
    content_encoding = None

    def __init__(self, message: Message, task_name: str, service: str) -> None:
        body, wire = as_it_came(message)
        self.headers = _identity(_mapping(message.headers), task_name, service)
        self.properties: dict[str, Any] = {}
        self.delivery_info = {
            "exchange": wire["headers"]["exchange"],
            "routing_key": wire["headers"]["routing_key"],
            "redelivered": wire["redelivered"],
        }
        self.payload = self.body = ((body,), {"wire": wire}, dict[str, Any]())


def as_it_came(message: Message) -> tuple[bytes, dict[str, Any]]:
    """The body's bytes, and all that a task has to know beside them."""
    came_with, came_by = _mapping(message.headers), _mapping(message.delivery_info)
    content_type = _text(message.content_type)
    return _as_bytes(message.body), {
        "content_type": content_type or None,
        "redelivered": bool(came_by.get("redelivered") or came_with.get("redelivered")),
        "refused": getattr(message, REFUSED, None),
        "headers": {
            **_bounded(came_with),
            "content_type": content_type,
            "exchange": _text(came_by.get("exchange")),
            "routing_key": _text(came_by.get("routing_key")),
        },
    }


class RawBatch:
    """Several messages, as if they were one whose argument is the list of them."""

    content_type = None
    content_encoding = None

    def __init__(self, messages: Sequence[Message], task_name: str, service: str) -> None:
        shadow = f"{len(messages)} messages"
        self.headers = _identity({"shadow": shadow}, task_name, service)
        self.properties: dict[str, Any] = {}
        self.delivery_info: dict[str, Any] = {}
        arguments = ([as_it_came(message) for message in messages],)
        self.payload = self.body = (arguments, dict[str, Any](), dict[str, Any]())


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


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
        str(name)[:_MAX_TEXT]: value if isinstance(value, _NUMBERS) else str(value)[:_MAX_TEXT]
        for name, value in kept
    }


def _as_bytes(body: object) -> bytes:
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    if isinstance(body, str):
        return body.encode("utf-8", "surrogatepass")
    return b"" if body is None else repr(body).encode()
