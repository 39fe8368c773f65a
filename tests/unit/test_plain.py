"""What is written without being read back is what would have been read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator, model_validator

from outbox import writing
from outbox.envelope import decode
from outbox.errors import ConfigurationError, InvalidPayload
from outbox.events import EventType
from outbox.limits import Limits
from outbox.writing import encode


@dataclass(frozen=True)
class Dataclass:
    order_id: UUID
    number: int
    note: str = "none"
    is_paid: bool = False
    voucher: str | None = None


@dataclass
class KeywordFirst:
    note: str = field(default="none", kw_only=True)
    order_id: UUID
    number: int
    is_paid: bool = False
    voucher: str | None = field(default=None, kw_only=True)


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    order_id: UUID
    number: int
    note: str = Field("none", description="what the customer said")
    is_paid: bool = False
    voucher: str | None = None


class Colour(StrEnum):
    RED = "red"


class Aliased(BaseModel):
    number: int = Field(alias="n")


class Constrained(BaseModel):
    number: int = Field(gt=1)


class Validated(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def one_more(cls, number: int) -> int:
        return number + 1


class ValidatedWhole(BaseModel):
    number: int

    @model_validator(mode="after")
    def look(self) -> ValidatedWhole:
        return self


class Computed(BaseModel):
    number: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> int:
        return 2 * self.number


class PostInit(BaseModel):
    number: int

    def model_post_init(self, _: Any) -> None: ...


class OwnInit(BaseModel):
    number: int

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class Excluded(BaseModel):
    number: int = Field(exclude=True)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    number: int


class Configured(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)
    text: str


@dataclass
class Floating:
    number: float


@dataclass
class Chosen:
    colour: Colour


@dataclass
class Nested:
    inner: Dataclass


@dataclass
class WithPostInit:
    number: int

    def __post_init__(self) -> None: ...


@dataclass
class NotGiven:
    number: int = field(init=False, default=1)


@dataclass(slots=True)
class Slotted:
    number: int


class Shouting:
    """Keeps a text beside the others, and reads it out in capitals."""

    def __get__(self, instance: Any, owner: type[Any]) -> str:
        return "none" if instance is None else vars(instance)["text"].upper()

    def __set__(self, instance: Any, text: str) -> None:
        vars(instance)["text"] = text


@dataclass
class Descriptive:
    text: str = Shouting()  # type: ignore[assignment]


@dataclass
class Interposed:
    text: str

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value.upper() if name == "text" else value


class Arbitrary: ...


@dataclass
class Unusable:
    arbitrary: Arbitrary


def type_of(payload_class: type[Any]) -> EventType:
    return EventType("thing.made", 1, payload_class)


TYPES = {cls: type_of(cls) for cls in (Dataclass, KeywordFirst, Model)}


def written(payload: object, event_type: EventType | None = None) -> bytes:
    """The payload as JSON."""
    event_type = event_type or TYPES[type(payload)]
    body = writing.write(event_type, payload, "test").body
    return body.partition(b',"data":')[2].removesuffix(b"}")


def looked_at(payload: object) -> bytes:
    with patch.object(writing, "write_plain", return_value=None):
        return written(payload)


def outcome(write: Callable[[], bytes]) -> bytes | str:
    try:
        return write()
    except InvalidPayload as error:
        return str(error)


@pytest.mark.parametrize("payload_class", TYPES)
def test_flat_classes_are_plain(payload_class: type[Any]) -> None:
    assert TYPES[payload_class].plain_fields is not None


@pytest.mark.parametrize("payload_class", [
    Aliased, Constrained, Validated, ValidatedWhole, Computed, PostInit, OwnInit, Excluded, Open, Configured, Floating,
    Chosen, Nested, WithPostInit, NotGiven, Slotted,
    Descriptive, Interposed,
])  # fmt: skip
def test_a_class_with_anything_more_to_it_is_not_plain(payload_class: type[Any]) -> None:
    assert type_of(payload_class).plain_fields is None


@pytest.mark.parametrize("payload_class", TYPES)
@given(st.uuids(), st.integers(), st.text(), st.booleans(), st.none() | st.text())
@example(UUID(int=1), 10**18, "\\u0000", True, "2026-01-01T00:00:00")
@example(UUID(int=1), -(10**18) + 1, '"\\', False, "\x7f\u2028")
def test_what_is_known_of_it_is_what_is_read_back(
    payload_class: type[Any], id: UUID, number: int, note: str, is_paid: bool, voucher: str | None
) -> None:
    payload = payload_class(order_id=id, number=number, note=note, is_paid=is_paid, voucher=voucher)
    expected = outcome(lambda: looked_at(payload))
    assert outcome(lambda: written(payload)) == expected
    if isinstance(expected, str):
        return
    assert TYPES[payload_class].adapter.validate_json(expected) == payload
    # Numbers of 19 digits and an escaped backslash before "u0000" are looked at.
    is_to_be_looked_at = abs(number) >= 10**18 or "u0000" in note + (voucher or "")
    with patch.object(writing, "write_payload", wraps=writing.write_payload) as look:
        written(payload)
    assert look.called is is_to_be_looked_at


@pytest.mark.parametrize("values", [
    {"number": True}, {"number": "1"}, {"number": 1.0}, {"note": Colour.RED}, {"note": None}, {"voucher": 1},
    {"order_id": str(UUID(int=1))}, {"note": "a\x00b"}, {"note": "\ud800"},
])  # fmt: skip
def test_a_value_of_another_type_than_its_field_is_looked_at(values: dict[str, Any]) -> None:
    payload = Dataclass(**{"order_id": UUID(int=1), "number": 1, **values})
    assert outcome(lambda: written(payload)) == outcome(lambda: looked_at(payload))


@pytest.mark.parametrize(("limits", "told"), [
    (Limits(number_length=11), "number of more than 11"), (Limits(nodes=66), "values; the limit is"),
    (Limits(depth=1), "nests more than"),
])  # fmt: skip
def test_limits_that_a_plain_payload_may_break_are_looked_at(limits: Limits, told: str) -> None:
    with pytest.raises(InvalidPayload, match=told):
        encode(
            TYPES[Dataclass], Dataclass(UUID(int=1), 123_456_789_012), source="test", limits=limits
        )


@pytest.mark.parametrize("payload_class", TYPES)
def test_what_is_held_beside_the_fields_is_not_written(payload_class: type[Any]) -> None:
    payload = payload_class(order_id=UUID(int=1), number=2)
    vars(payload)["cached"] = "aside"
    assert written(payload) == looked_at(payload)


@pytest.mark.parametrize("payload_class", [Descriptive, Interposed])
def test_what_a_dataclass_says_its_field_is_is_written(payload_class: type[Any]) -> None:
    assert written(payload_class("abc"), type_of(payload_class)) == b'{"text":"ABC"}'


def test_an_object_of_another_class_is_not_taken_for_one_with_the_same_fields() -> None:
    class Alike:
        def __init__(self) -> None:
            vars(self).update(vars(Dataclass(UUID(int=1), 2)))

    with pytest.raises(InvalidPayload, match="Alike"):
        written(Alike(), TYPES[Dataclass])


def test_a_class_that_pydantic_cannot_use_is_not_an_invalid_payload() -> None:
    with pytest.raises(ConfigurationError, match="Unusable cannot be the payload"):
        written(Unusable(Arbitrary()), type_of(Unusable))


def test_an_envelope_has_what_its_bytes_say() -> None:
    made = encode(TYPES[Model], Model(order_id=UUID(int=1), number=2), source="test")
    assert decode(made.body) == made
