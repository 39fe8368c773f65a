"""An event as a record on Kafka: key, value and headers.

The value is the envelope, byte for byte: what the CloudEvents binding for Kafka calls structured mode, so that any
consumer with a CloudEvents library reads it. Celery has no part in this: what its messages say in keywords stands in
the header `outbox`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import keywords_of

CONTENT_TYPE: Final = "application/cloudevents+json; charset=UTF-8"
TYPE_HEADER: Final = "ce_type"
ID_HEADER: Final = "ce_id"
KEYWORDS_HEADER: Final = "outbox"

ID_PLACE: Final = 2
"""Where the event's id stands among the headers."""

Headers = list[tuple[str, str]]
Record = tuple[str, bytes, str, Headers]
"""Topic, value, key and headers; of texts the library sends the UTF-8, without a copy of ours."""


class RecordEncoder:
    """Makes keys and headers."""

    def __init__(self) -> None:
        self._of_type: dict[str, Headers] = {}

    def records(
        self, batch: Sequence[OutgoingMessage], topics: Mapping[tuple[str, str | None], str]
    ) -> list[Record]:
        """The batch's records; *topics*: by type and queue.

        The key is the event's, without one its id, so that copies of it meet in one partition. Raises `KeyError` for a
        topic that is not known.
        """
        known = self._of_type
        records = []
        for id, type, key, body, _, _, key_seq, queue, handler in batch:
            if type not in known:
                known[type] = [("content-type", CONTENT_TYPE), (TYPE_HEADER, type)]
            headers = [*known[type], (ID_HEADER, id)]
            if handler is not None or key_seq is not None:
                keywords = json.dumps(keywords_of(handler, key_seq))
                headers.append((KEYWORDS_HEADER, keywords))
            records.append((topics[type, queue], body, id if key is None else key, headers))
        return records


def header_texts(headers: Iterable[tuple[str, Any]] | None) -> dict[str, str]:
    """A record's headers as text, whatever they hold; the last one of a name counts."""
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
        for name, value in headers or ()
    }
