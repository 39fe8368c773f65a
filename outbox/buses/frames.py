"""AMQP 0-9-1 frames of `basic.publish`, written for a whole batch at once.

py-amqp makes every frame of every message anew; for events of one type all but the ids and the body is the same. So the
method frame and the header frame are made once per type, with py-amqp's own serializer, and cut where the id goes.
`tests/unit/test_frames.py` compares the bytes with py-amqp's.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack
from typing import Any, Final

from amqp.basic_message import Message

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import CONTENT_ENCODING, CONTENT_TYPE, message_body, message_headers

LONGEST_NAME: Final = 255
"""Bytes of a routing key, and of the name of a queue or an exchange."""

_METHOD, _HEADER, _BODY = 1, 2, 3
_BASIC, _PUBLISH = 60, 40
_END: Final = b"\xce"
_ID_PLACEHOLDER: Final = "\x01" * 36
_FRAME_OVERHEAD: Final = 8
_MOST_TEMPLATES: Final = 10_000


class Unroutable(Exception):
    """No queue can have such a name, or be bound to such a type."""


@dataclass(frozen=True, slots=True)
class _Template:
    method: bytes
    """The whole method frame."""
    head: bytes
    """The header frame up to the body's size."""
    properties: tuple[bytes, ...]
    """The rest of the header frame, cut where the id goes."""


class FrameEncoder:
    """Encodes messages for one channel of one connection."""

    def __init__(self, channel_id: int, frame_max: int, *, mandatory: bool = False) -> None:
        """*frame_max*: the largest frame that the broker takes, in bytes. *mandatory*: return what no queue takes."""
        self._channel_id = channel_id
        self._largest_body_frame = frame_max - _FRAME_OVERHEAD
        self._mandatory = mandatory
        self._templates: dict[tuple[str, str, str], _Template] = {}

    def encode(self, message: OutgoingMessage, exchange: str, routing_key: str) -> bytes:
        """All frames of one message. Raises `Unroutable`."""
        template = self._templates.get((exchange, routing_key, message.type))
        if template is None:
            template = self._remember(exchange, routing_key, message.type)
        body = message_body(message)
        properties = message.id.encode().join(template.properties)
        frames = [template.method, template.head, pack(">Q", len(body)), properties]
        for start in range(0, len(body), self._largest_body_frame):
            part = body[start : start + self._largest_body_frame]
            frames += [pack(">BHI", _BODY, self._channel_id, len(part)), part, _END]
        return b"".join(frames)

    def _remember(self, exchange: str, routing_key: str, event_type: str) -> _Template:
        if len(self._templates) >= _MOST_TEMPLATES:
            self._templates.clear()
        template = self._make_template(exchange, routing_key, event_type)
        self._templates[exchange, routing_key, event_type] = template
        return template

    def _make_template(self, exchange: str, routing_key: str, event_type: str) -> _Template:
        # What is meant for one queue must not vanish when that queue is not there.
        mandatory = self._mandatory or not exchange
        arguments = (
            b"\x00\x00" + _short_string(exchange) + _short_string(routing_key) + bytes([mandatory])
        )
        method = pack(">HH", _BASIC, _PUBLISH) + arguments
        content: Any = _content(**message_properties(event_type, _ID_PLACEHOLDER))
        properties: bytes = content._serialize_properties()
        payload_size = 4 + 8 + len(properties)
        return _Template(
            method=pack(">BHI", _METHOD, self._channel_id, len(method)) + method + _END,
            head=pack(">BHIHH", _HEADER, self._channel_id, payload_size, _BASIC, 0),
            properties=tuple((properties + _END).split(_ID_PLACEHOLDER.encode())),
        )


def message_properties(event_type: str, event_id: str) -> dict[str, Any]:
    """The AMQP properties of a message: persistent, and what kombu reads."""
    return {
        "content_type": CONTENT_TYPE,
        "content_encoding": CONTENT_ENCODING,
        "application_headers": message_headers(event_type, event_id),
        "delivery_mode": 2,
        "correlation_id": event_id,
    }


def _content(**properties: Any) -> Any:
    return Message("", **properties)


def _short_string(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > LONGEST_NAME:
        raise Unroutable(f"{text[:40]!r}... is longer than {LONGEST_NAME} bytes")
    return pack(">B", len(encoded)) + encoded
