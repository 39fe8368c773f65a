"""The envelope of a new event: its bytes, and what the log keeps beside them.

`data` stands last and is written once (`outbox.payload`); nothing re-encodes it on the way. What a reader would have to
refuse is refused here.

Between two round trips of a transaction other code has had the processor's caches, and what is run costs several times
what it costs in a loop: so little is called here, and nothing is made that the log does not take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache, partial
from json.encoder import encode_basestring as quoted
from time import time_ns
from typing import Final, NamedTuple
from uuid import UUID

from pydantic_core import from_json

from outbox.context import Handling
from outbox.envelope import RESERVED, Envelope, checked_text, envelope_of, shown
from outbox.errors import InvalidPayload, MalformedMessage, PayloadTooLarge
from outbox.events import EventType
from outbox.ids import new_id_and_text
from outbox.limits import DEFAULT_LIMITS, NODES_OF_A_HEAD, Limits
from outbox.payload import write_payload
from outbox.plain import write_plain

_ATTRIBUTE_NAME = re.compile(r"[a-z0-9]{1,20}")
_MAX_EXTENSIONS = NODES_OF_A_HEAD // 2


class Written(NamedTuple):
    """A new event, as the log takes it."""

    event_type: EventType
    id: UUID
    source: str
    key: str | None
    body: bytes
    """The envelope."""


_written: Final = partial(tuple.__new__, Written)
"""`Written._make`, without a frame of Python."""


def write(
    event_type: EventType,
    payload: object,
    source: str | None,
    caused_by: Envelope | None = None,
    correlation_id: str | None = None,
    extensions: Mapping[str, str | int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    handled: Handling | None = None,
) -> Written:
    """Write the envelope of a new event, refusing here what a reader would have to refuse later.

    *handled*: what says source and cause, where they are not given. Without that, the source is the first part of the
    event type. Raises `InvalidPayload` (naming the field) or `PayloadTooLarge`.
    """
    if handled is not None:
        caused_by = caused_by or handled.envelope
        source = handled.service if source is None else source
    if source is None:
        source = event_type.aggregate
    plain, fields = None, event_type.plain_fields
    if fields is not None and type(payload) is event_type.payload_class:
        plain = write_plain(fields, payload)
    data = write_payload(event_type, payload) if plain is None else plain
    key = event_type.key_of(payload)
    event_id, id_text = new_id_and_text()
    seconds, nanoseconds = divmod(time_ns(), 1_000_000_000)
    if correlation_id is None and caused_by is not None:
        correlation_id = caused_by.correlation_id or str(caused_by.id)
    try:
        if type(source) is not str:
            checked_text("source", source)
        head = (
            f'{{"specversion":"1.0","id":"{id_text}",{_origin(source, event_type.name, event_type.version)},'
            # A format of `06d` would be read anew each time.
            f'"time":"{_second(seconds)}.{str(1_000_000_000 + nanoseconds)[1:7]}Z",'
            '"datacontenttype":"application/json","correlationid":'
        )
        if correlation_id is None:
            head += f'"{id_text}"'
        else:
            head += quoted(checked_text("correlationid", correlation_id))
        if key is not None:
            head += f',"partitionkey":{quoted(key)}'
        if caused_by is not None:
            head += f',"causationid":"{caused_by.id}"'
        if extensions:
            head += _write_extensions(extensions)
        head += ',"data":'
        body = head.encode() + data + b"}"
        if len(body) > limits.size:
            raise PayloadTooLarge(
                f"{event_type} was refused: {len(body):,} bytes encoded, the limit is {limits.size:,}; "
                "publish a reference to the data instead (claim check)"
            )
        if plain is None or len(fields or ()) > limits.of_data.plain_values:
            limits.of_data.check(data)
    except UnicodeEncodeError as error:
        raise InvalidPayload(
            f"{event_type} was refused: an attribute holds half a surrogate pair, which is no text"
        ) from error
    except (MalformedMessage, ValueError) as error:
        raise InvalidPayload(f"{event_type} was refused: {error}") from error
    return _written((event_type, event_id, source, key, body))


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
    """Make the envelope of a new event, as a reader will find it. Raises what `write` raises."""
    # None is a mistake here, and no wish for the default.
    named = source or ""
    written = write(event_type, payload, named, caused_by, correlation_id, extensions, limits)
    given = {} if extensions is None else dict(extensions)
    if correlation_id is None or any(type(value) is not str for value in given.values()):
        return envelope_of(from_json(written.body), written.body)
    # As it is for the events of a saga: nothing has to be read.
    return Envelope.of_known(
        id=written.id, source=named, type=event_type.name, version=event_type.version, body=written.body,
        key=written.key, correlation_id=correlation_id, causation_id=None if caused_by is None else caused_by.id,
        extensions=given,
    )  # fmt: skip


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:-6]


@lru_cache(maxsize=1024)
def _origin(source: str, event_type: str, version: int) -> str:
    checked = quoted(checked_text("source", source))
    return f'"source":{checked},"type":"{event_type}","eventversion":{version}'


def _write_extensions(extensions: Mapping[str, str | int]) -> str:
    if not isinstance(extensions, Mapping):
        raise ValueError(f"its extensions are {shown(extensions)}; they must be a mapping")
    if len(extensions) > _MAX_EXTENSIONS:
        raise ValueError(f"it has {len(extensions)} extensions; {_MAX_EXTENSIONS} are possible")
    written = ""
    for name, value in extensions.items():
        is_name = isinstance(name, str) and _ATTRIBUTE_NAME.fullmatch(name)
        if not is_name or name in RESERVED:
            raise ValueError(
                f"extension {shown(name)} is no free CloudEvents attribute name: lower-case "
                "letters and digits, 20 at most, and none of the standard ones"
            )
        if value == "":
            written += f',"{name}":""'
        elif isinstance(value, str):
            written += f',"{name}":{quoted(checked_text(name, value))}'
        elif isinstance(value, bool):
            written += f',"{name}":{"true" if value else "false"}'
        elif isinstance(value, int) and -(2**31) <= value < 2**31:
            written += f',"{name}":{int(value)}'
        else:
            raise ValueError(
                f"extension {name!r} is {shown(value)}; CloudEvents attributes are texts, "
                "integers of 32 bits or booleans"
            )
    return written
