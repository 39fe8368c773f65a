"""The envelope: a CloudEvents 1.0 event as JSON, kept as the exact bytes from publish to handler.

The bytes made at publish (`outbox.writing`) are stored, relayed and handed over unchanged, so a signature or a hash
over them holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from pydantic_core import from_json

from outbox.errors import MalformedMessage
from outbox.limits import DEFAULT_LIMITS, Limits

MAX_VERSION = 2**31 - 1
_MAX_ATTRIBUTE_LENGTH = 1_000
RESERVED = frozenset({
    "specversion", "id", "source", "type", "time", "datacontenttype", "dataschema", "subject", "eventversion",
    "partitionkey", "correlationid", "causationid", "data", "data_base64",
})  # fmt: skip


@dataclass(frozen=True, init=False)
class Envelope:
    """One event on its way: its attributes, its payload as parsed JSON, and the exact bytes they came in."""

    id: UUID
    source: str
    type: str
    version: int
    time: datetime
    """When it was published, in UTC."""
    data: Any = field(repr=False)
    body: bytes = field(repr=False)
    key: str | None
    correlation_id: str | None
    """What this event belongs to: the id of the event or saga that began it all."""
    causation_id: UUID | None
    """The id of the event whose handling published this one."""
    extensions: Mapping[str, str | int]
    """Further CloudEvents attributes: lower-case letters and digits, 20 characters at most."""

    def __init__(
        self,
        id: UUID,
        source: str,
        type: str,
        version: int,
        time: datetime,
        data: Any,
        body: bytes,
        key: str | None = None,
        correlation_id: str | None = None,
        causation_id: UUID | None = None,
        extensions: Mapping[str, str | int] | None = None,
    ) -> None:
        # One of these is made for each event that is received, and what `dataclass` writes for a frozen class takes
        # twice as long.
        vars(self).update(
            id=id, source=source, type=type, version=version, time=time, data=data, body=body, key=key,
            correlation_id=correlation_id, causation_id=causation_id,
            extensions={} if extensions is None else extensions,
        )  # fmt: skip

    @classmethod
    def of_known(cls, **known: Any) -> Envelope:
        """One of which all is known but what is read here when somebody asks for it: time and payload."""
        envelope = cls.__new__(cls)
        vars(envelope).update(known)
        return envelope

    def __getattr__(self, name: str) -> Any:
        if name not in ("time", "data") or "body" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raw = from_json(self.body)
        vars(self).update(time=_time(raw), data=raw["data"])
        return vars(self)[name]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the exact bytes: two deliveries with one id and another digest are not the same event."""
        return hashlib.sha256(self.body).digest()


def decode(body: bytes, limits: Limits = DEFAULT_LIMITS) -> Envelope:
    """Read an envelope from its bytes. Raises `MalformedMessage` saying what is wrong with it."""
    return envelope_of(limits.parse(body), body)


def envelope_of(raw: Any, body: bytes) -> Envelope:
    """The envelope in *raw*, which is what the JSON of *body* says. Raises `MalformedMessage`."""
    if not isinstance(raw, dict):
        raise MalformedMessage(
            f"the message is a JSON {type(raw).__name__}, not a CloudEvents object"
        )
    if raw.get("specversion") != "1.0":
        raise MalformedMessage(
            f"specversion is {shown(raw.get('specversion'))}; this release reads CloudEvents 1.0"
        )
    if "data" not in raw:
        raise MalformedMessage("the envelope has no data")
    try:
        causation = _optional_text(raw, "causationid")
        return Envelope(
            id=_uuid("id", _text(raw, "id")),
            source=_text(raw, "source"),
            type=_text(raw, "type"),
            version=_version(raw),
            time=_time(raw),
            data=raw["data"],
            body=body,
            key=_optional_text(raw, "partitionkey"),
            correlation_id=_optional_text(raw, "correlationid"),
            causation_id=None if causation is None else _uuid("causationid", causation),
            extensions=_read_extensions(raw),
        )
    except ValueError as error:
        raise MalformedMessage(f"the envelope is not valid: {error}") from error


def _read_extensions(raw: Mapping[str, Any]) -> dict[str, str | int]:
    extensions: dict[str, str | int] = {}
    for name in raw.keys() - RESERVED:
        value = raw[name]
        if isinstance(value, str | int):
            extensions[name] = value
        elif value is not None:
            raise ValueError(
                f"extension {shown(name)} is {shown(value)}, neither text nor integer nor boolean"
            )
    return extensions


def _text(raw: Mapping[str, Any], name: str) -> str:
    return checked_text(name, raw.get(name))


def checked_text(name: str, value: object) -> str:
    """*value*, a text attribute's. Raises `ValueError` where it can be none."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_ATTRIBUTE_LENGTH:
        raise ValueError(
            f"{name} is {shown(value)}, not a text of 1 to {_MAX_ATTRIBUTE_LENGTH:,} characters"
        )
    if "\x00" in value:
        raise ValueError(f"{name} holds a NUL character, which PostgreSQL cannot store")
    return value


def _optional_text(raw: Mapping[str, Any], name: str) -> str | None:
    return None if raw.get(name) is None else _text(raw, name)


def _uuid(name: str, value: str) -> UUID:
    try:
        return UUID(value)
    except ValueError:
        raise ValueError(f"{name} is {shown(value)}, not a UUID") from None


def _version(raw: Mapping[str, Any]) -> int:
    version = raw.get("eventversion", 1)
    if type(version) is not int or not 0 < version <= MAX_VERSION:
        raise ValueError(f"eventversion is {shown(version)}, not an integer from 1 on")
    return version


def _time(raw: Mapping[str, Any]) -> datetime:
    text = _text(raw, "time")
    try:
        value = datetime.fromisoformat(text)
        if value.tzinfo is None:
            raise ValueError("it has no zone")
        return value.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"time is {shown(text)}: {error}") from None


def shown(value: object) -> str:
    """*value* for an error text, which must not grow with what a stranger sent."""
    if isinstance(value, str):
        value = value[:100]
    elif not isinstance(value, int | float | bool | None):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
