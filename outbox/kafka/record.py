"""Records from Kafka, given to the receiver."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from outbox.buses.kafka_record import KEYWORDS_HEADER, TYPE_HEADER, header_texts
from outbox.envelope import decode
from outbox.errors import MalformedMessage
from outbox.receive import Incoming, Receipt, Receiver


class RecordReceiver:
    """Gives records to a receiver, and passes over those of types that its service does not take."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._own_topic = receiver.service.queue
        self._taken = frozenset(receiver.service.bindings)

    def receive(self, records: Sequence[Any], *, redelivered: bool) -> list[Receipt | None]:
        """Settle *records*, so that they can be left behind; None for one that is not for this service.

        More than one are taken in one transaction where that is possible. Raises `NotSettled`.
        """
        receipts: list[Receipt | None] = [None] * len(records)
        ours: list[tuple[int, Incoming]] = []
        for number, record in enumerate(records):
            body = record.value() or b""
            headers = header_texts(record.headers())
            if record.topic() != self._own_topic and self._is_for_others(body, headers):
                continue
            came = {
                **headers,
                "topic": record.topic(),
                "partition": record.partition(),
                "offset": record.offset(),
            }
            try:
                handler, key_seq = _keywords(headers.get(KEYWORDS_HEADER))
            except MalformedMessage as error:
                receipts[number] = self._receiver.quarantine(body, str(error), came)
            else:
                ours.append((number, Incoming(body, handler, key_seq, redelivered, came)))
        for (number, _), receipt in zip(ours, self._settle([one for _, one in ours]), strict=True):
            receipts[number] = receipt
        return receipts

    def _settle(self, messages: list[Incoming]) -> list[Receipt]:
        if len(messages) > 1:
            return self._receiver.take_in_batch(messages)
        return [self._receiver.take_in(one) for one in messages]

    def _is_for_others(self, body: bytes, headers: dict[str, str]) -> bool:
        event_type = headers.get(TYPE_HEADER)
        if event_type is None:
            # Not from a relay: only the envelope says it. What cannot be read is quarantined later.
            try:
                event_type = decode(body, self._receiver.settings.limits).type
            except MalformedMessage:
                return False
        return event_type not in self._taken


def _keywords(header: str | None) -> tuple[str | None, int | None]:
    if header is None:
        return None, None
    try:
        keywords = json.loads(header)
    except ValueError as error:
        raise MalformedMessage(f"its header {KEYWORDS_HEADER!r} is no JSON: {error}") from error
    match keywords:
        case {**only} if only.keys() <= {"handler", "key_seq"}:
            handler, key_seq = only.get("handler"), only.get("key_seq")
            if isinstance(handler, str | None) and (key_seq is None or type(key_seq) is int):
                return handler or None, key_seq
    raise MalformedMessage(f"its header {KEYWORDS_HEADER!r} says something else: {header[:200]}")
