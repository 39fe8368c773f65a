"""An event as a Celery message (protocol 2), which any Celery worker, Flower and the instrumentations understand.

The task has one constant name, so no worker ever discards an event for not knowing its type; `shadow` shows the type
to people. The envelope travels as one JSON string, byte for byte as it was stored. Nothing of the payload is in a
header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from json.encoder import encode_basestring as quoted
from typing import Any, Final

from outbox.buses.base import OutgoingMessage

TASK: Final = "outbox.receive"
CONTENT_TYPE: Final = "application/json"
CONTENT_ENCODING: Final = "utf-8"


@dataclass(frozen=True, slots=True)
class CeleryMessage:
    """Body and headers of one message."""

    body: bytes
    headers: dict[str, Any]
    content_type: str = CONTENT_TYPE
    content_encoding: str = CONTENT_ENCODING


def celery_message(message: OutgoingMessage) -> CeleryMessage:
    """The Celery message for an event."""
    return CeleryMessage(message_body(message), message_headers(message.type, message.id))


def message_headers(event_type: str, event_id: str) -> dict[str, Any]:
    """What Celery's worker, its events and Flower need; for the rest they have the same defaults as `send_task`."""
    return {
        "lang": "py",
        "task": TASK,
        "id": event_id,
        "shadow": event_type,
        "root_id": event_id,
        # Where these two are missing or empty, a plain worker logs the arguments themselves.
        "argsrepr": "(...)",
        "kwargsrepr": "{}",
        "ignore_result": True,
    }


def message_body(message: OutgoingMessage) -> bytes:
    """`[[envelope], keywords, {}]` as JSON."""
    # Bytes that are no UTF-8 can only have been written around `publish`; they must not stop the relay, and will be
    # quarantined where they arrive.
    text = quoted(message.body.decode("utf-8", "replace"))
    if message.handler is None and message.key_seq is None:
        return f"[[{text}], {{}}, {{}}]".encode()
    keywords = json.dumps(keywords_of(message.handler, message.key_seq))
    return f"[[{text}], {keywords}, {{}}]".encode()


def keywords_of(handler: str | None, key_seq: int | None) -> dict[str, Any]:
    """What the receiver is told beside the envelope."""
    keywords: dict[str, Any] = {}
    if handler is not None:
        keywords["handler"] = handler
    if key_seq is not None:
        keywords["key_seq"] = key_seq
    return keywords
