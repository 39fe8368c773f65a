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
ID_HEADER: Final = "ce_id"
KEYWORDS_HEADER: Final = "outbox"

Headers = list[tuple[str, bytes]]


class RecordEncoder:
    """Makes keys and headers."""

    def __init__(self) -> None:
        self._of_type: dict[str, Headers] = {}

    def encode(self, message: OutgoingMessage) -> tuple[bytes, Headers]:
        """The event's key, without one its id, so that copies of it meet in one partition; and the headers."""
        event_id = message.id.encode()
        headers = [*self._known(message.type), (ID_HEADER, event_id)]
        if message.handler is not None or message.key_seq is not None:
            keywords = json.dumps(message_keywords(message)).encode()
            headers.append((KEYWORDS_HEADER, keywords))
        return event_id if message.key is None else message.key.encode(), headers

    def _known(self, event_type: str) -> Headers:
        known = self._of_type.get(event_type)
        if known is None:
            known = [("content-type", CONTENT_TYPE), (TYPE_HEADER, event_type.encode())]
            self._of_type[event_type] = known
        return known


def header_texts(headers: Iterable[tuple[str, Any]] | None) -> dict[str, str]:
    """A record's headers as text, whatever they hold; the last one of a name counts."""
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
        for name, value in headers or ()
    }
