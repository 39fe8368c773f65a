"""Event types: which class carries which type name and version, and how old versions become new ones.

An event type is declared once, at import, beside the class of its payload:

    @event("order.created", version=1, key="order_id")
    class OrderCreated(BaseModel):
        order_id: UUID

A registry answers two questions: which type is this object (publishing), and which class reads this type and version
(receiving). Both sides fail early: a second class under one name is an error at import.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Any, TypeVar
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import (
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    PydanticUserError,
)
from pydantic_core import to_json

from outbox.envelope import MAX_VERSION
from outbox.errors import (
    ConfigurationError,
    InvalidPayload,
    MalformedMessage,
    UnknownEventType,
    UnregisteredEvent,
)
from outbox.plain import Fields, plain_fields

T = TypeVar("T")
Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_MAX_TYPE_LENGTH = 200
_MAX_KEY_LENGTH = 255


@dataclass(frozen=True)
class EventType:
    """One type name in one version, and the class of its payload."""

    name: str
    version: int
    payload_class: type[Any]
    key: str | Callable[[Any], object] | None = None
    """Attribute of the payload (or a function of it) whose value orders events; None for no order."""
    ordered: bool = False
    """Whether the key's events carry a gapless sequence and reach every handler in that order."""

    @cached_property
    def aggregate(self) -> str:
        """The first part of its name: what it happened to, and by default who says so."""
        return self.name.split(".", 1)[0]

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """What reads and writes payloads. Raises `ConfigurationError` for a class that pydantic cannot use."""
        try:
            return TypeAdapter(self.payload_class)
        except (
            PydanticSchemaGenerationError,
            PydanticUndefinedAnnotation,
            PydanticUserError,
        ) as error:
            raise ConfigurationError(
                f"{_where(self.payload_class)} cannot be the payload of an event, as pydantic can neither read nor "
                f"write it: {str(error).splitlines()[0]}"
            ) from error

    @cached_property
    def by_alias(self) -> bool:
        """Whether fields are written under their aliases: as they are read, unless the class says otherwise."""
        written = _config(self.payload_class).get("serialize_by_alias")
        return True if written is None else bool(written)

    @cached_property
    def plain_fields(self) -> Fields | None:
        """Its fields, if it is known beforehand that what is written of them can be read back.

        Raises `ConfigurationError` for a class that pydantic cannot use yet.
        """
        try:
            return plain_fields(self.adapter.core_schema, self.payload_class)
        except PydanticUserError as error:
            raise ConfigurationError(f"{self} cannot be written: {error}") from error

    @cached_property
    def hides_times(self) -> bool:
        """Whether some class in it writes times as numbers, so that the bytes do not show a missing zone."""
        return "ser_json_temporal" in repr(self.adapter.core_schema)

    def key_of(self, payload: object) -> str | None:
        """The ordering key of *payload* as text.

        Raises `InvalidPayload` if it is none, empty, too long, no text, or of a type without a text of its own.
        """
        if self.key is None:
            return None
        try:
            value = getattr(payload, self.key) if isinstance(self.key, str) else self.key(payload)
            if type(value) is UUID:
                return str(value)
            text = str(value) if type(value) is int else _key_text(value)
        except Exception as error:
            raise InvalidPayload(f"{self}: its key could not be taken: {error!r}") from error
        if not 0 < len(text) <= _MAX_KEY_LENGTH or "\x00" in text or not _is_unicode(text):
            raise InvalidPayload(
                f"{self}: the key {self.key!r} is {value!r:.60}; it must be text, an integer, a UUID, an Enum of them "
                f"or of a class with __str__, have 1 to {_MAX_KEY_LENGTH} characters, no NUL and no half surrogate pair"
            )
        return text

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"


@dataclass
class Registry:
    """The event types that one process knows. Most programs use the module's own, through `@event`."""

    by_class: dict[type[Any], EventType] = field(default_factory=dict)
    """To be read only."""
    _by_name: dict[str, dict[int, EventType]] = field(default_factory=dict)
    _upcasters: dict[tuple[str, int], Upcaster] = field(default_factory=dict)

    def event(
        self,
        name: str,
        *,
        version: int = 1,
        key: str | Callable[[Any], object] | None = None,
        ordered: bool = False,
    ) -> Callable[[type[T]], type[T]]:
        """Declare the decorated class (pydantic model or dataclass) as the payload of event type *name*.

        Raises `ConfigurationError` at import for a bad name, a bad key, or a name and version that another class has.
        """

        def register(payload_class: type[T]) -> type[T]:
            self.add(EventType(name, version, payload_class, key, ordered))
            return payload_class

        return register

    def add(self, event_type: EventType) -> None:
        """Register a type made by hand. Raises `ConfigurationError`, as `event` does."""
        _check_declaration(event_type)
        taken = self._by_name.get(event_type.name, {}).get(event_type.version)
        cls = event_type.payload_class
        if taken is not None and not _same_class(taken.payload_class, cls):
            raise ConfigurationError(
                f"event type {event_type} is declared twice: by {_where(taken.payload_class)} and by {_where(cls)}; "
                "give one of them another name or another version"
            )
        other = self.by_class.get(cls)
        if other is not None and (other.name, other.version) != (
            event_type.name,
            event_type.version,
        ):
            raise ConfigurationError(
                f"{_where(cls)} is declared as {other} and as {event_type}: publishing could not tell which is meant; "
                "use a class for each"
            )
        self.by_class[cls] = event_type
        self._by_name.setdefault(event_type.name, {})[event_type.version] = event_type

    def upcast(self, name: str, *, from_version: int) -> Callable[[Upcaster], Upcaster]:
        """Declare the decorated function as the step from *from_version* of event type *name* to the next version.

        It takes and returns the payload as a dict, and is applied before validation; steps chain. Raises
        `ConfigurationError` for a version that no event can have, and for a second upcaster of one.
        """
        _check_version(from_version, f"upcaster of {name}: from_version")

        def register(step: Upcaster) -> Upcaster:
            if (name, from_version) in self._upcasters:
                raise ConfigurationError(
                    f"event type {name} v{from_version} has two upcasters; remove one"
                )
            self._upcasters[name, from_version] = step
            return step

        return register

    def of(self, payload: object) -> EventType:
        """The event type of a payload object. Raises `UnregisteredEvent`."""
        found = self.by_class.get(type(payload))
        if found is not None:
            return found
        if isinstance(payload, type):
            raise UnregisteredEvent(f"{_where(payload)} is a class: publish an instance of it")
        if isinstance(payload, list | tuple | set):
            raise UnregisteredEvent(
                f"a {type(payload).__name__} is no event: use publish_all for many"
            )
        return self.of_class(type(payload))

    def of_class(self, payload_class: type[Any]) -> EventType:
        """The event type of a payload class. Raises `UnregisteredEvent`."""
        try:
            return self.by_class[payload_class]
        except KeyError:
            raise UnregisteredEvent(
                f"{_where(payload_class)} is no event type: decorate it with "
                '@event("aggregate.happened", version=1, key="...")'
            ) from None

    def newest(self, name: str) -> EventType | None:
        """The highest version of event type *name*, or None where the name is not known."""
        versions = self._by_name.get(name)
        return versions[max(versions)] if versions else None

    def read(self, name: str, version: int, data: Any) -> Any:
        """Make the payload object from *data* (parsed JSON) of event type *name* in *version*.

        A version with a class of its own and no upcaster is read as that class; otherwise upcasters lead to the
        next version until one fits. Raises `UnknownEventType` where no class is reached, `MalformedMessage` where the
        data do not validate.
        """
        versions = self._by_name.get(name)
        if not versions:
            raise UnknownEventType(
                f"event type {name!r} is not known here; known are: {', '.join(self.names()) or 'none'}"
            )
        at = version
        if (name, at) in self._upcasters:
            data = deepcopy(data)  # the envelope's own stays as it came
        while (name, at) in self._upcasters:
            data = self._apply_upcaster(name, at, data)
            at += 1
        event_type = versions.get(at)
        if event_type is None:
            raise UnknownEventType(
                f"event type {name} arrived in version {version}; known are {sorted(versions)}: "
                "deploy the class (or an upcaster) for it, then redrive"
            )
        try:
            # Through JSON: a strict model takes text for a date from JSON, but not from Python.
            return event_type.adapter.validate_json(to_json(data))
        except ConfigurationError:
            raise
        except ValidationError as error:
            raise MalformedMessage(
                f"event {event_type} does not fit {_where(event_type.payload_class)}: {brief(error)}"
            ) from error
        except Exception as error:  # from a validator of the class
            raise MalformedMessage(
                f"event {event_type} does not fit {_where(event_type.payload_class)}: "
                f"{type(error).__name__} in its validation"
            ) from error

    def _apply_upcaster(self, name: str, version: int, data: Any) -> Any:
        try:
            raised = self._upcasters[name, version](data)
            to_json(raised)
        except Exception as error:
            raise MalformedMessage(
                f"the upcaster of {name} v{version} failed: {error!r}"
            ) from error
        return raised

    def upcasts_from(self, name: str, version: int) -> bool:
        """Whether an upcaster leads on from *version* of event type *name*."""
        return (name, version) in self._upcasters

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def __iter__(self) -> Iterator[EventType]:
        for versions in self._by_name.values():
            yield from versions.values()


def _check_declaration(event_type: EventType) -> None:
    name, where = event_type.name, _where(event_type.payload_class)
    if not _TYPE_NAME.fullmatch(name) or len(name) > _MAX_TYPE_LENGTH:
        raise ConfigurationError(
            f"{where}: {name!r} is no event type name; write dotted lower-case words, aggregate first, "
            'what happened last, as in "order.created"'
        )
    _check_version(event_type.version, f"{where}: version")
    if event_type.ordered and event_type.key is None:
        raise ConfigurationError(f"{where}: ordered=True needs key=...: order is kept per key")
    cls, key = event_type.payload_class, event_type.key
    fields = getattr(cls, "model_fields", None)
    if fields is None and is_dataclass(cls):
        fields = cls.__dataclass_fields__
    if fields is None:
        raise ConfigurationError(
            f"{where} is neither a pydantic model nor a dataclass (put @event above @dataclass)"
        )
    if isinstance(key, str) and key not in fields and not hasattr(cls, key):
        raise ConfigurationError(
            f"{where}: key={key!r} names no field; fields are: {', '.join(fields)}"
        )
    try:
        _ = event_type.adapter
    except ConfigurationError as error:
        # A name that is defined further down in the module: asked again at first use.
        if not isinstance(error.__cause__, NameError):
            raise


def _check_version(version: object, what: str) -> None:
    # As a reader does: what only equals an integer is written into the envelope as something else.
    if type(version) is not int or not 0 < version <= MAX_VERSION:
        raise ConfigurationError(
            f"{what} is {version!r}; versions are integers from 1 to {MAX_VERSION:,}"
        )


def _key_text(value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str | int):
        return str(value)
    # What has no text of its own would give that of `repr`: an address in memory, an order of a set.
    is_telling = type(value).__str__ is not object.__str__ and not isinstance(value, bytes)
    return str(value) if is_telling and value is not None else ""


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _config(cls: type[Any]) -> dict[str, Any]:
    return getattr(cls, "model_config", None) or getattr(cls, "__pydantic_config__", None) or {}


def _same_class(one: type[Any], other: type[Any]) -> bool:
    # A module imported twice (under pytest, or as __main__ and by name) declares the same class again.
    return one is other or (
        one.__qualname__ == other.__qualname__
        and (one.__module__ == other.__module__ or _file(one) == _file(other) is not None)
    )


def _file(cls: type[Any]) -> str | None:
    return getattr(sys.modules.get(cls.__module__), "__file__", None)


def _where(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def brief(error: ValidationError) -> str:
    """A pydantic error in one line: each field with what is wrong, without the values (they may be secret)."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    shown = "; ".join(
        f"{'.'.join(map(str, p['loc'])) or 'payload'}: {p['msg']}" for p in problems[:5]
    )
    return shown + (f" (and {len(problems) - 5} more)" if len(problems) > 5 else "")


registry = Registry()
event = registry.event
upcast = registry.upcast
