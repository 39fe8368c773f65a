"""The envelope: a CloudEvents 1.0 event as JSON, kept as the exact bytes from publish to handler.

The bytes made at publish are stored, relayed and handed over unchanged, so a signature or a hash over them holds.
`data` stands last and is written once by pydantic; nothing re-encodes it on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, from_json

from outbox.errors import InvalidPayload, MalformedMessage, PayloadTooLarge
from outbox.events import EventType, brief
from outbox.ids import new_id
from outbox.limits import DEFAULT_LIMITS, Limits

_ATTRIBUTE_NAME = re.compile(r"[a-z0-9]{1,20}")
_RESERVED = {
    "specversion", "id", "source", "type", "time", "datacontenttype", "dataschema", "subject", "eventversion",
    "partitionkey", "correlationid", "causationid", "data", "data_base64",
}  # fmt: skip


@dataclass(frozen=True)
class Envelope:
    """One event on its way: its attributes, its payload as parsed JSON, and the exact bytes they came in."""

    id: UUID
    source: str
    type: str
    version: int
    time: datetime
    data: Any = field(repr=False)
    body: bytes = field(repr=False)
    key: str | None = None
    correlation_id: str | None = None
    """What this event belongs to: the id of the event or saga that began it all."""
    causation_id: UUID | None = None
    """The id of the event whose handling published this one."""
    extensions: Mapping[str, str | int] = field(default_factory=dict)
    """Further CloudEvents attributes: lower-case letters and digits, 20 characters at most."""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the exact bytes: two deliveries with one id and another digest are not the same event."""
        return hashlib.sha256(self.body).digest()


def encode(
    event_type: EventType,
    payload: object,
    *,
    source: str,
    caused_by: Envelope | None = None,
    correlation_id: str | None = None,
    extensions: Mapping[str, str | int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Envelope:
    """Make the envelope of a new event, refusing here what a reader would have to refuse later.

    Raises `InvalidPayload` (naming the field) or `PayloadTooLarge`.
    """
    data = _encode_payload(event_type, payload)
    event_id = new_id()
    now = datetime.now(UTC)
    key = event_type.key_of(payload)
    if correlation_id is None:
        correlation_id = str(event_id) if caused_by is None else caused_by.correlation_id
    attributes: dict[str, str | int] = {
        "specversion": "1.0",
        "id": str(event_id),
        "source": source,
        "type": event_type.name,
        "eventversion": event_type.version,
        "time": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
    }
    if key is not None:
        attributes["partitionkey"] = key
    if correlation_id is not None:
        attributes["correlationid"] = correlation_id
    if caused_by is not None:
        attributes["causationid"] = str(caused_by.id)
    extensions = dict(extensions or {})
    _check_extensions(extensions)
    attributes.update(extensions)
    head = json.dumps(attributes, ensure_ascii=False, separators=(",", ":")).encode()
    body = b'%s,"data":%s}' % (head[:-1], data)
    _check_limits(event_type, body, limits)
    return Envelope(
        id=event_id, source=source, type=event_type.name, version=event_type.version, time=now,
        data=from_json(data), body=body, key=key, correlation_id=correlation_id,
        causation_id=None if caused_by is None else caused_by.id, extensions=extensions,
    )  # fmt: skip


def decode(body: bytes, limits: Limits = DEFAULT_LIMITS) -> Envelope:
    """Read an envelope from its bytes. Raises `MalformedMessage` saying what is wrong with it."""
    limits.check(body)
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedMessage(f"the message is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise MalformedMessage(
            f"the message is a JSON {type(raw).__name__}, not a CloudEvents object"
        )
    if raw.get("specversion") != "1.0":
        raise MalformedMessage(
            f"specversion is {raw.get('specversion')!r}; this release reads CloudEvents 1.0"
        )
    if "data" not in raw:
        raise MalformedMessage("the envelope has no data")
    try:
        version = raw.get("eventversion", 1)
        if type(version) is not int or version < 1:
            raise ValueError(f"eventversion is {version!r}")
        causation = _optional_text(raw, "causationid")
        return Envelope(
            id=UUID(_text(raw, "id")),
            source=_text(raw, "source"),
            type=_text(raw, "type"),
            version=version,
            time=_time(raw),
            data=raw["data"],
            body=body,
            key=_optional_text(raw, "partitionkey"),
            correlation_id=_optional_text(raw, "correlationid"),
            causation_id=None if causation is None else UUID(causation),
            extensions={
                name: value
                for name, value in raw.items()
                if name not in _RESERVED
                and isinstance(value, str | int)
                and not isinstance(value, bool)
            },
        )
    except (KeyError, ValueError) as error:
        raise MalformedMessage(f"the envelope is not valid: {error}") from error


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}, not a text")
    return value


def _optional_text(raw: Mapping[str, Any], name: str) -> str | None:
    return None if raw.get(name) is None else _text(raw, name)


def _time(raw: Mapping[str, Any]) -> datetime:
    value = datetime.fromisoformat(_text(raw, "time"))
    if value.tzinfo is None:
        raise ValueError(f"time {raw['time']!r} has no zone")
    return value


def _encode_payload(event_type: EventType, payload: object) -> bytes:
    adapter = event_type.adapter
    try:
        _refuse_unstorable(adapter.dump_python(payload, warnings=False), "", event_type)
        data = adapter.dump_json(payload, warnings="error")
        # What cannot be read back would stop every consumer: find it here, before the commit.
        adapter.validate_json(data)
    except ValidationError as error:
        raise InvalidPayload(f"{event_type} was refused: {brief(error)}") from error
    except PydanticSerializationError as error:
        raise InvalidPayload(f"{event_type} was refused: {error}") from error
    return data


def _refuse_unstorable(value: Any, path: str, event_type: EventType) -> None:
    if isinstance(value, str):
        if "\x00" in value:
            raise InvalidPayload(
                f"{event_type} was refused: {path} holds a NUL character, which PostgreSQL cannot store"
            )
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise InvalidPayload(
                f"{event_type} was refused: {path} holds half a surrogate pair, which is no text"
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidPayload(
                f"{event_type} was refused: {path} is {value}, which JSON cannot say"
            )
    elif isinstance(value, datetime):
        if value.tzinfo is None:
            raise InvalidPayload(
                f"{event_type} was refused: {path} is a time without a zone; use an aware datetime"
            )
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_unstorable(name, f"{path}.{name}" if path else str(name), event_type)
            _refuse_unstorable(item, f"{path}.{name}" if path else str(name), event_type)
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            _refuse_unstorable(item, f"{path}[{index}]", event_type)


def _check_extensions(extensions: Mapping[str, str | int]) -> None:
    for name in extensions:
        if not _ATTRIBUTE_NAME.fullmatch(name) or name in _RESERVED:
            raise InvalidPayload(
                f"extension {name!r} is no free CloudEvents attribute name: lower-case letters and digits, "
                "20 at most, and none of the standard ones"
            )


def _check_limits(event_type: EventType, body: bytes, limits: Limits) -> None:
    if len(body) > limits.size:
        raise PayloadTooLarge(
            f"{event_type} was refused: {len(body):,} bytes encoded, the limit is {limits.size:,}; "
            "publish a reference to the data instead (claim check)"
        )
    try:
        limits.check(body)
    except MalformedMessage as error:
        raise InvalidPayload(f"{event_type} was refused: {error}") from error
