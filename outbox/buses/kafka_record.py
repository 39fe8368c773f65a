"""An event as a record on Kafka: key, value and headers.

The value is the envelope, byte for byte: what the CloudEvents binding for Kafka calls structured mode, so that any
consumer with a CloudEvents library reads it. Celery has no part in this: what its messages say in keywords stands in
the header `outbox`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import message_keywords

CONTENT_TYPE: Final = b"application/cloudevents+json; charset=UTF-8"
TYPE_HEADER: Final = "ce_type"
KEYWORDS_HEADER: Final = "outbox"

Headers = list[tuple[str, bytes]]


def record_key(message: OutgoingMessage) -> bytes:
    """The event's key; without one its id, so that copies of it meet in one partition."""
    return (message.key if message.key is not None else str(message.event_id)).encode()


def record_headers(message: OutgoingMessage) -> Headers:
    headers = [
        ("content-type", CONTENT_TYPE),
        (TYPE_HEADER, message.type.encode()),
        ("ce_id", str(message.event_id).encode()),
    ]
    keywords = message_keywords(message)
    if keywords:
        headers.append((KEYWORDS_HEADER, json.dumps(keywords).encode()))
    return headers


def header_texts(headers: Iterable[tuple[str, Any]] | None) -> dict[str, str]:
    """A record's headers as text, whatever they hold; the last one of a name counts."""
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
        for name, value in headers or ()
    }
