"""The body of a Celery message (protocol 2), read from its raw bytes by ourselves.

Celery would read it before our code runs, and acknowledge what it cannot read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from outbox.errors import MalformedMessage
from outbox.limits import Limits

_JSON_TYPES = (None, "application/json", "application/json; charset=utf-8")
_ESCAPED = 6
"""A character of the envelope takes this many bytes at most in the JSON string around it."""


@dataclass(frozen=True)
class WireBody:
    """What the message says to the receiver."""

    envelope: bytes
    handler: str | None = None
    key_seq: int | None = None


def read_body(raw: bytes, content_type: str | None, limits: Limits) -> WireBody:
    """Read `[[envelope], {"handler": ..., "key_seq": ...}, {...}]`. Raises `MalformedMessage`.

    The third part, where Celery keeps callbacks and chains to run, is passed over.
    """
    if content_type not in _JSON_TYPES:
        raise MalformedMessage(f"its content type is {content_type!r}; only JSON is read")
    if len(raw) > limits.size * _ESCAPED + 10_000:
        raise MalformedMessage(f"the message has {len(raw):,} bytes")
    try:
        parts = from_json(raw)
    except ValueError as error:
        raise MalformedMessage(f"the message is no JSON: {error}") from error
    match parts:
        case [[str() as envelope], dict() as keywords, _]:
            return _with_keywords(envelope, keywords)
    raise MalformedMessage("the message is JSON, but not [[envelope], {...}, {...}]")


def _with_keywords(envelope: str, keywords: dict[str, Any]) -> WireBody:
    handler, key_seq = keywords.get("handler"), keywords.get("key_seq")
    if not isinstance(handler, str | None) or not (key_seq is None or type(key_seq) is int):
        raise MalformedMessage(f"the message's handler or key_seq is of another type: {keywords}")
    return WireBody(envelope.encode(), handler or None, key_seq)
