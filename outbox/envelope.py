"""The envelope: a CloudEvents 1.0 event as JSON, kept as the exact bytes from publish to handler.

The bytes made at publish are stored, relayed and handed over unchanged, so a signature or a hash over them holds.
`data` stands last and is written once by pydantic (`outbox.payload`); nothing re-encodes it on the way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from json.encoder import encode_basestring as quoted
from time import time_ns
from typing import Any
from uuid import UUID

from outbox.errors import InvalidPayload, MalformedMessage, PayloadTooLarge
from outbox.events import EventType
from outbox.ids import new_id_and_text
from outbox.limits import DEFAULT_LIMITS, NODES_OF_A_HEAD, Limits
from outbox.payload import write_payload

_ATTRIBUTE_NAME = re.compile(r"[a-z0-9]{1,20}")
_MAX_ATTRIBUTE_LENGTH = 1_000
_MAX_EXTENSIONS = NODES_OF_A_HEAD // 2
_MAX_VERSION = 2**31 - 1
_RESERVED = frozenset({
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
        # One of these is made for each event that is published or received, and what `dataclass` writes for a frozen
        # class takes twice as long.
        vars(self).update(
            id=id, source=source, type=type, version=version, time=time, data=data, body=body, key=key,
            correlation_id=correlation_id, causation_id=causation_id,
            extensions={} if extensions is None else extensions,
        )  # fmt: skip

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
    data, parsed = write_payload(event_type, payload)
    key = event_type.key_of(payload)
    event_id, id_text = new_id_and_text()
    seconds, microseconds = divmod(time_ns() // 1_000, 1_000_000)
    second, second_text = _second(seconds)
    causation_id = None if caused_by is None else caused_by.id
    if correlation_id is None:
        correlation_id = id_text
        if caused_by is not None:
            correlation_id = caused_by.correlation_id or str(caused_by.id)
    try:
        origin = _origin(source, event_type.name, event_type.version)
        if correlation_id is not id_text:
            _checked_text("correlationid", correlation_id)
        head = (
            f'{{"specversion":"1.0","id":"{id_text}",{origin},"time":"{second_text}.{microseconds:06d}Z",'
            f'"datacontenttype":"application/json","correlationid":{quoted(correlation_id)}'
        )
        if key is not None:
            head += f',"partitionkey":{quoted(key)}'
        if causation_id is not None:
            head += f',"causationid":"{causation_id}"'
        if extensions:
            head += _write_extensions(extensions)
        body = b'%s,"data":%s}' % (head.encode(), data)
        if len(body) > limits.size:
            raise PayloadTooLarge(
                f"{event_type} was refused: {len(body):,} bytes encoded, the limit is {limits.size:,}; "
                "publish a reference to the data instead (claim check)"
            )
        if parsed is None or not limits.of_data.allows_plain(parsed):
            parsed = limits.of_data.parse_flat(data)
        if parsed is None:
            parsed = limits.of_data.parse(data)
    except UnicodeEncodeError as error:
        raise InvalidPayload(
            f"{event_type} was refused: an attribute holds half a surrogate pair, which is no text"
        ) from error
    except (MalformedMessage, ValueError) as error:
        raise InvalidPayload(f"{event_type} was refused: {error}") from error
    now = second + timedelta(microseconds=microseconds)
    return Envelope(
        event_id, source, event_type.name, event_type.version, now, parsed, body, key, correlation_id, causation_id,
        dict(extensions) if extensions else None,
    )  # fmt: skip


def decode(body: bytes, limits: Limits = DEFAULT_LIMITS) -> Envelope:
    """Read an envelope from its bytes. Raises `MalformedMessage` saying what is wrong with it."""
    raw = limits.parse(body)
    if not isinstance(raw, dict):
        raise MalformedMessage(
            f"the message is a JSON {type(raw).__name__}, not a CloudEvents object"
        )
    if raw.get("specversion") != "1.0":
        raise MalformedMessage(
            f"specversion is {_shown(raw.get('specversion'))}; this release reads CloudEvents 1.0"
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


@lru_cache(maxsize=4)
def _second(seconds: int) -> tuple[datetime, str]:
    second = datetime.fromtimestamp(seconds, UTC)
    return second, second.isoformat()[:-6]


@lru_cache(maxsize=1024)
def _origin(source: str, event_type: str, version: int) -> str:
    checked = quoted(_checked_text("source", source))
    return f'"source":{checked},"type":"{event_type}","eventversion":{version}'


def _write_extensions(extensions: Mapping[str, str | int]) -> str:
    if len(extensions) > _MAX_EXTENSIONS:
        raise ValueError(f"it has {len(extensions)} extensions; {_MAX_EXTENSIONS} are possible")
    written = ""
    for name, value in extensions.items():
        if not _ATTRIBUTE_NAME.fullmatch(name) or name in _RESERVED:
            raise ValueError(
                f"extension {name!r} is no free CloudEvents attribute name: lower-case "
                "letters and digits, 20 at most, and none of the standard ones"
            )
        if value == "":
            written += f',"{name}":""'
        elif isinstance(value, str):
            written += f',"{name}":{quoted(_checked_text(name, value))}'
        elif isinstance(value, bool):
            written += f',"{name}":{"true" if value else "false"}'
        elif isinstance(value, int) and -(2**31) <= value < 2**31:
            written += f',"{name}":{int(value)}'
        else:
            raise ValueError(
                f"extension {name!r} is {_shown(value)}; CloudEvents attributes are texts, "
                "integers of 32 bits or booleans"
            )
    return written


def _read_extensions(raw: Mapping[str, Any]) -> dict[str, str | int]:
    extensions: dict[str, str | int] = {}
    for name in raw.keys() - _RESERVED:
        value = raw[name]
        if isinstance(value, str | int):
            extensions[name] = value
        elif value is not None:
            raise ValueError(
                f"extension {_shown(name)} is {_shown(value)}, neither text nor integer nor boolean"
            )
    return extensions


def _text(raw: Mapping[str, Any], name: str) -> str:
    return _checked_text(name, raw.get(name))


def _checked_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_ATTRIBUTE_LENGTH:
        raise ValueError(
            f"{name} is {_shown(value)}, not a text of 1 to {_MAX_ATTRIBUTE_LENGTH:,} characters"
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
        raise ValueError(f"{name} is {_shown(value)}, not a UUID") from None


def _version(raw: Mapping[str, Any]) -> int:
    version = raw.get("eventversion", 1)
    if type(version) is not int or not 0 < version <= _MAX_VERSION:
        raise ValueError(f"eventversion is {_shown(version)}, not an integer from 1 on")
    return version


def _time(raw: Mapping[str, Any]) -> datetime:
    text = _text(raw, "time")
    try:
        value = datetime.fromisoformat(text)
        if value.tzinfo is None:
            raise ValueError("it has no zone")
        return value.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"time is {_shown(text)}: {error}") from None


def _shown(value: object) -> str:
    """*value* for an error text, which must not grow with what a stranger sent."""
    if isinstance(value, str):
        value = value[:100]
    elif not isinstance(value, int | float | bool | None):
        return f"a {type(value).__name__}"
    shown = repr(value)
    return shown if len(shown) <= 120 else f"{shown[:120]}…"
