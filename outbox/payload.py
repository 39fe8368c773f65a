"""The payload of an event as JSON, written so that every reader gets back what was published, or refused by field.

JSON cannot say everything that Python can. Some of it turns into something else without a word: NaN into null, a time
without a zone into text that the reader takes for its own zone. So what was written is read back, and what only the
Python values can tell is looked for in them. Finding the field takes time; so first the bytes are asked whether there
can be anything to find.
"""

from __future__ import annotations

import re
from collections import deque
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from math import isfinite
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError

from outbox.errors import ConfigurationError, InvalidPayload
from outbox.events import EventType, brief

_TIME_WITHOUT_ZONE = re.compile(rb'T\d\d:\d\d:\d\d(?:\.\d+)?"')
_NUL = b"\\u0000"
_T, _BACKSLASH = b"T\\"  # as integers they are looked for in a tenth of the time
_HARMLESS = frozenset({int, bool, type(None), UUID, Decimal, date, bytes})
_INPUT_VALUE = re.compile(r"input_value=.*?, (?=input_type=)", re.DOTALL)

_Path = tuple[Any, str]
"""The path of what a value is in, and the part that leads on from there."""


def write_payload(event_type: EventType, payload: object) -> bytes:
    """*payload* as JSON, whatever it is.

    Raises `InvalidPayload`, naming the field, if a reader would not get it back, and `ConfigurationError` if its class
    is not complete.
    """
    try:
        adapter = event_type.adapter
        data = adapter.serializer.to_json(payload, by_alias=event_type.by_alias, warnings="error")
        if event_type.hides_times or _may_be_unstorable(data):
            _refuse_unstorable(event_type, payload)
        # What cannot be read back would stop every consumer: find it here, before the commit.
        adapter.validator.validate_json(data)
    except InvalidPayload:
        raise
    except PydanticUserError as error:
        raise ConfigurationError(f"{event_type} cannot be written: {error}") from error
    except ValidationError as error:
        raise InvalidPayload(
            f"{event_type} was refused, for it could not be read back: {brief(error)}"
        ) from error
    except PydanticSerializationError as error:
        _refuse_unstorable(event_type, payload)
        without_values = _INPUT_VALUE.sub("", str(error))
        raise InvalidPayload(f"{event_type} was refused: {without_values}") from error
    except Exception as error:  # raised by a validator or serializer of the class
        raise InvalidPayload(
            f"{event_type} was refused: {type(error).__name__} in its validation"
        ) from error
    return data


def _may_be_unstorable(data: bytes) -> bool:
    return (
        data.find(b"null") >= 0  # written for NaN too
        or (_BACKSLASH in data and _NUL in data)
        or (_T in data and _TIME_WITHOUT_ZONE.search(data) is not None)
    )


def _refuse_unstorable(event_type: EventType, payload: object) -> None:
    values = None
    with suppress(Exception):
        values = event_type.adapter.serializer.to_python(payload, warnings=False)
    found: list[tuple[_Path | None, Any]] = [(None, values)]
    looked_into = set()  # a container may hold itself
    for path, value in found:  # grows on the way
        if type(value) in _HARMLESS or id(value) in looked_into:
            continue
        if isinstance(value, dict | list | tuple | set | frozenset | deque):
            looked_into.add(id(value))
        if isinstance(value, dict):
            for name, item in value.items():
                found.append((path, name))
                found.append(((path, f".{name}"), item))
        elif isinstance(value, list | tuple | set | frozenset | deque):
            found.extend(((path, f"[{index}]"), item) for index, item in enumerate(value))
        else:
            problem = _problem_of(value)
            if problem is not None:
                raise InvalidPayload(f"{event_type} was refused: {_shown(path)} {problem}")


def _problem_of(value: object) -> str | None:
    match value:
        case str() if "\x00" in value:
            return "holds a NUL character, which PostgreSQL cannot store"
        case str() if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return "holds half a surrogate pair, which is no text"
        case float() if not isfinite(value):
            return f"is {value}, which JSON cannot say"
        case datetime() if value.tzinfo is None:
            return "is a time without a zone; use an aware datetime"
    return None


def _shown(path: _Path | None) -> str:
    parts = []
    while path is not None:
        path, part = path
        parts.append(part)
    return "".join(reversed(parts)).lstrip(".") or "a name in it"
