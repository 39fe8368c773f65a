"""One record from Kafka, given to the receiver."""

from __future__ import annotations

import json
from typing import Any

from outbox.buses.kafka_record import KEYWORDS_HEADER, TYPE_HEADER, header_texts
from outbox.envelope import decode
from outbox.errors import MalformedMessage
from outbox.receive import Receipt, Receiver


class RecordReceiver:
    """Gives records to a receiver, and passes over those of types that its service does not take."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._own_topic = receiver.service.queue
        self._taken = frozenset(receiver.service.bindings)

    def receive(self, record: Any, *, redelivered: bool) -> Receipt | None:
        """Settle *record*, so that it can be left behind; None where it is not for this service.

        Raises `NotSettled`.
        """
        body = record.value() or b""
        headers = header_texts(record.headers())
        where = {
            "topic": record.topic(),
            "partition": record.partition(),
            "offset": record.offset(),
        }
        if record.topic() != self._own_topic and self._is_for_others(body, headers):
            return None
        try:
            keywords = _keywords(headers.get(KEYWORDS_HEADER))
        except MalformedMessage as error:
            return self._receiver.quarantine(body, str(error), {**headers, **where})
        return self._receiver.receive(
            body, redelivered=redelivered, headers={**headers, **where}, **keywords
        )

    def _is_for_others(self, body: bytes, headers: dict[str, str]) -> bool:
        event_type = headers.get(TYPE_HEADER)
        if event_type is None:
            # Not from a relay: only the envelope says it. What cannot be read is quarantined later.
            try:
                event_type = decode(body, self._receiver.settings.limits).type
            except MalformedMessage:
                return False
        return event_type not in self._taken


def _keywords(header: str | None) -> dict[str, Any]:
    if header is None:
        return {}
    try:
        keywords = json.loads(header)
    except ValueError as error:
        raise MalformedMessage(f"its header {KEYWORDS_HEADER!r} is no JSON: {error}") from error
    match keywords:
        case {**only} if only.keys() <= {"handler", "key_seq"}:
            handler, key_seq = only.get("handler"), only.get("key_seq")
            if isinstance(handler, str | None) and (key_seq is None or type(key_seq) is int):
                return {"handler": handler or None, "key_seq": key_seq}
    raise MalformedMessage(f"its header {KEYWORDS_HEADER!r} says something else: {header[:200]}")
