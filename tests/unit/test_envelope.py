"""An envelope is read back as it was made, by whoever reads it, and whatever else arrives is refused."""

from __future__ import annotations

import json
import pickle
from collections import deque
from dataclasses import FrozenInstanceError, dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from http import HTTPStatus
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_serializer, field_validator

from outbox import writing
from outbox.envelope import Envelope, decode
from outbox.errors import ConfigurationError, InvalidPayload, MalformedMessage, PayloadTooLarge
from outbox.events import EventType, Registry
from outbox.ids import created_at, new_id
from outbox.limits import Limits
from outbox.writing import encode

registry = Registry()
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
NONEMPTY = TEXT.filter(bool)
ZONED = st.datetimes(
    min_value=datetime(1, 1, 3),  # noqa: DTZ001
    max_value=datetime(9999, 12, 29),  # noqa: DTZ001
    timezones=st.just(UTC),
)


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Line(BaseModel):
    sku: str
    quantity: int
    price: Decimal


@registry.event("order.created", key="order_id")
class OrderCreated(BaseModel):
    order_id: UUID
    placed_at: datetime
    due: date | None = None
    opens: time | None = None
    patience: timedelta = timedelta(0)
    weight: float | None = None
    color: Color = Color.RED
    note: str = ""
    tags: set[str] = set()
    lines: list[Line] = []
    more: dict[str, Any] = {}


@registry.event("order.noted", key="number")
@dataclass
class OrderNoted:
    number: int
    note: str = ""
    at: datetime | None = None
    weights: tuple[float, ...] = ()


@registry.event("anything.happened")
class Anything(BaseModel):
    value: Any = None


@registry.event("names.given")
class Named(RootModel[dict[Any, Any]]):
    """Its names are data, and two of them can be one in JSON."""


ORDERS = st.builds(
    OrderCreated,
    order_id=st.uuids(),
    placed_at=ZONED,
    due=st.none() | st.dates(),
    patience=st.timedeltas(timedelta(0), timedelta(days=10_000)),
    weight=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    color=st.sampled_from(Color),
    note=TEXT,
    tags=st.sets(TEXT, max_size=3),
    lines=st.lists(
        st.builds(
            Line,
            sku=TEXT,
            quantity=st.integers(-(2**63), 2**63),
            price=st.decimals(allow_nan=False, allow_infinity=False, places=2),
        ),
        max_size=3,
    ),
    more=st.dictionaries(TEXT, st.none() | st.integers() | TEXT | st.lists(TEXT), max_size=3),
)


def encoded(payload: object, **options: Any) -> Envelope:
    options.setdefault("source", "orders")
    return encode(registry.of(payload), payload, **options)


def read(envelope: Envelope) -> Any:
    return registry.read(envelope.type, envelope.version, envelope.data)


# ---- what was written is read ----


@given(ORDERS, NONEMPTY.filter(lambda text: len(text) < 200), TEXT, st.booleans())
def test_decoding_gives_back_what_was_encoded(
    order: OrderCreated, source: str, extension: str, caused: bool
) -> None:
    envelope = encoded(
        order,
        source=source,
        caused_by=encoded(Anything()) if caused else None,
        extensions={"one": extension, "two": -7},
    )
    decoded = decode(envelope.body)
    assert decoded == envelope
    assert decoded.digest == envelope.digest
    assert read(decoded) == order


@given(
    correlation=NONEMPTY.filter(lambda text: len(text) <= 1_000),
    saga=TEXT,
    note=TEXT,
    caused=st.booleans(),
)
def test_an_event_of_a_saga_is_read_from_its_body_only_where_it_has_to_be(
    correlation: str, saga: str, note: str, caused: bool
) -> None:
    order = OrderCreated(order_id=uuid4(), placed_at=datetime.now(UTC), note=note)
    cause = encode(registry.of(order), order, source="shop") if caused else None
    saga = saga[:1_000]

    written = encode(
        registry.of(order), order, source="shop", caused_by=cause, correlation_id=correlation,
        extensions={"sagaid": saga},
    )  # fmt: skip

    assert {"time", "data"} & vars(written).keys() == set()
    assert pickle.loads(pickle.dumps(written)) == written == decode(written.body)
    assert {"time", "data"} <= vars(written).keys()
    with pytest.raises(AttributeError, match="nothing"):
        _ = written.nothing  # type: ignore[attr-defined]


def test_the_body_is_a_cloudevent_with_its_data_last() -> None:
    order = OrderNoted(7, 'a "quoted" näme\n')
    envelope = encoded(order, source="/orders", correlation_id="c1", extensions={"sagaid": "s1"})
    body = json.loads(envelope.body)
    assert body == {
        "specversion": "1.0",
        "id": str(envelope.id),
        "source": "/orders",
        "type": "order.noted",
        "eventversion": 1,
        "time": body["time"],
        "datacontenttype": "application/json",
        "partitionkey": "7",
        "correlationid": "c1",
        "sagaid": "s1",
        "data": {"number": 7, "note": 'a "quoted" näme\n', "at": None, "weights": []},
    }
    assert list(body)[-1] == "data"
    assert datetime.fromisoformat(body["time"]) == envelope.time


def test_an_event_that_nothing_caused_begins_its_own_correlation() -> None:
    envelope = encoded(OrderNoted(1))
    assert envelope.correlation_id == str(envelope.id)
    assert envelope.causation_id is None


def test_a_caused_event_takes_over_correlation_and_names_its_cause() -> None:
    first = encoded(OrderNoted(1), correlation_id="the whole")
    second = encoded(OrderNoted(2), caused_by=first)
    assert (second.correlation_id, second.causation_id) == ("the whole", first.id)
    assert encoded(OrderNoted(3), caused_by=first, correlation_id="x").correlation_id == "x"


def test_the_cause_itself_is_the_correlation_where_it_came_without_one() -> None:
    foreign = decode(message(correlationid=None))
    assert encoded(OrderNoted(1), caused_by=foreign).correlation_id == str(foreign.id)


def test_fields_travel_under_their_aliases_unless_the_class_says_otherwise() -> None:
    other = Registry()

    @other.event("alias.read", key="order_id")
    class Aliased(BaseModel):
        order_id: int = Field(alias="orderId")

    @other.event("name.read")
    class ByName(BaseModel):
        model_config = ConfigDict(validate_by_name=True, serialize_by_alias=False)
        order_id: int = Field(alias="orderId")

    for payload, data in (
        (Aliased(orderId=1), {"orderId": 1}),
        (ByName(order_id=1), {"order_id": 1}),
    ):
        envelope = encode(other.of(payload), payload, source="x")
        assert envelope.data == data
        assert other.read(envelope.type, 1, envelope.data) == payload


def test_the_attributes_are_those_of_the_bytes() -> None:
    before = datetime.now(UTC)
    envelope = encoded(OrderNoted(1))
    body = json.loads(envelope.body)
    assert body["id"] == str(envelope.id)
    assert envelope.id == UUID(body["id"])
    assert datetime.fromisoformat(body["time"]) == envelope.time
    assert before <= envelope.time <= datetime.now(UTC)


@pytest.mark.parametrize("microseconds", [0, 1, 999_999, 1_000_000, -1, -1_500_000, 2**50])
def test_the_time_is_told_whatever_the_clock_says(
    microseconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "time_ns", lambda: microseconds * 1_000 + 999)
    told = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    body = json.loads(encoded(OrderNoted(1)).body)
    assert body["time"] == told.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@pytest.mark.parametrize("version", [0, 2**31, 1.5, 1.0, True, HTTPStatus.OK, "1", None])
def test_a_version_that_no_reader_takes_is_refused_where_it_is_declared(version: Any) -> None:
    says = r"versions are integers from 1 to 2,147,483,647"
    with pytest.raises(ConfigurationError, match=rf"OrderNoted: version is .*; {says}"):
        Registry().event("order.noted", version=version)(OrderNoted)
    with pytest.raises(ConfigurationError, match=rf"order\.noted: from_version is .*; {says}"):
        Registry().upcast("order.noted", from_version=version)


@pytest.mark.parametrize("digits", [256, 1_001, 5_000])
def test_a_number_too_long_for_a_key_is_refused(digits: int) -> None:
    too_long = EventType("order.noted", 1, OrderNoted, key=lambda _: 10 ** (digits - 1))
    with pytest.raises(InvalidPayload, match=r"order\.noted v1: (the|its) key"):
        encode(too_long, OrderNoted(1), source="x")


def test_an_envelope_cannot_be_changed() -> None:
    envelope = encoded(OrderNoted(1))
    with pytest.raises(FrozenInstanceError):
        envelope.key = "2"  # type: ignore[misc]
    assert replace(envelope, key="2") != envelope


def test_ids_sort_by_the_time_that_they_were_made_at() -> None:
    ids = [encoded(OrderNoted(n)).id for n in range(100)]
    assert ids == sorted(ids)
    born = created_at(ids[0])
    assert born is not None
    assert abs(datetime.now(UTC) - born) < timedelta(minutes=1)


def test_an_id_that_tells_no_time_has_none() -> None:
    assert created_at(uuid4()) is None
    assert created_at(UUID("ffffffff-ffff-7fff-bfff-ffffffffffff")) is None


# ---- what would not come back is refused at publish, by field ----


def test_refused_payloads_name_the_field() -> None:
    naive = datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001
    now = datetime.now(UTC)
    refused: list[tuple[object, str]] = [
        (OrderNoted(1, "a\x00b"), "note holds a NUL"),
        (OrderNoted(1, "a\ud800b"), "note holds half a surrogate pair"),
        (OrderNoted(1, at=naive), "at is a time without a zone"),
        (OrderNoted(1, at=naive.replace(microsecond=6)), "at is a time without a zone"),
        (OrderNoted(1, weights=(1.0, float("nan"))), r"weights\[1\] is nan"),
        (
            OrderCreated(order_id=uuid4(), placed_at=now, weight=float("inf")),
            "weight is inf",
        ),
        (OrderCreated(order_id=uuid4(), placed_at=now, more={"a": [{"b": naive}]}), r"more\.a\[0\]\.b is a time"),
        (OrderCreated(order_id=uuid4(), placed_at=now, more={"a\x00": 1}), "more holds a NUL"),
        (Anything(value={float("-inf"): None, naive: 1}), "value is -inf"),
        (Anything(value={naive: 1}), "value is a time"),
        (Anything(value=deque([naive])), r"value\[0\] is a time"),
        (Anything(value={"a": (None, float("nan"))}), r"value\.a\[1\] is nan"),
    ]  # fmt: skip
    for payload, reason in refused:
        with pytest.raises(InvalidPayload, match=reason):
            encoded(payload)


def test_a_payload_that_is_not_of_its_type_is_refused_without_showing_its_value() -> None:
    with pytest.raises(InvalidPayload, match=r"order\.noted v1 was refused") as refused:
        encoded(OrderNoted("secret"))  # type: ignore[arg-type]
    assert "secret" not in str(refused.value)
    with pytest.raises(InvalidPayload):
        encoded(OrderCreated.model_construct(order_id="secret", placed_at=datetime.now(UTC)))


def test_what_pydantic_cannot_write_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (object(), b"\xff", endless):
        with pytest.raises(InvalidPayload):
            encoded(Anything(value=value))


def test_two_keys_that_become_one_name_are_refused() -> None:
    for payload in (Anything(value={1: "a", "1": "b"}), Named({1: "a", "1": "b"})):
        with pytest.raises(InvalidPayload, match="same name twice"):
            encoded(payload)


NAMED = st.dictionaries(
    st.integers(0, 2) | st.sampled_from(["0", "1", "2", "a,", "b:", "{", "é", "\ud800"]),
    st.integers() | st.floats() | st.text('a,:{[ "\\\x00\ud800', max_size=4) | st.just([{"a": 1}]),
    max_size=4,
)  # fmt: skip


@given(NAMED)
def test_whatever_is_published_is_read_as_it_was_given(values: dict[Any, Any]) -> None:
    try:
        envelope = encoded(Named(values))
    except InvalidPayload:
        return
    assert decode(envelope.body) == envelope
    assert envelope.data == {str(name): value for name, value in values.items()}
    assert len(envelope.data) == len(values)


def test_a_payload_that_its_own_class_would_not_read_is_refused() -> None:
    other = Registry()

    @other.event("one.way")
    class OneWay(BaseModel):
        model_config = ConfigDict(extra="forbid")
        number: int

        @field_serializer("number")
        def as_word(self, number: int) -> str:
            return f"number {number}"

    @other.event("broken.validator")
    class Broken(BaseModel):
        number: int = 0

        @field_validator("number")
        @classmethod
        def divide(cls, number: int) -> int:
            return 1 // number

    with pytest.raises(InvalidPayload, match="could not be read back: number"):
        encode(other.of(OneWay(number=1)), OneWay(number=1), source="x")
    with pytest.raises(InvalidPayload, match="ZeroDivisionError in its validation"):
        encode(other.of(Broken()), Broken(), source="x")
    with pytest.raises(MalformedMessage, match="ZeroDivisionError in its validation"):
        other.read("broken.validator", 1, {"number": 0})


def test_times_written_as_numbers_are_refused_without_a_zone_too() -> None:
    other = Registry()

    class Inner(BaseModel):
        model_config = ConfigDict(ser_json_temporal="seconds")
        at: datetime

    @other.event("numbers.told")
    class Numbers(BaseModel):
        inner: Inner

    naive = Numbers(inner=Inner(at=datetime(2026, 1, 1)))  # noqa: DTZ001
    with pytest.raises(InvalidPayload, match=r"inner\.at is a time without a zone"):
        encode(other.of(naive), naive, source="x")


def test_text_that_looks_like_something_else_is_published() -> None:
    for note in ("2026-01-02T03:04:05", "null", "\\u0000", "NaN", "1e99999"):
        assert encoded(OrderNoted(1, note)).data["note"] == note


def test_a_class_that_was_never_completed_is_refused_with_its_name() -> None:
    other = Registry()

    @other.event("never.complete")
    class Incomplete(BaseModel):
        missing: Nowhere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigurationError, match="Incomplete"):
        encode(other.of_class(Incomplete), Incomplete.model_construct(), source="x")


def test_attributes_that_a_reader_would_refuse_are_refused() -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"source": ""}, "source"),
        ({"source": None}, "source"),
        ({"source": "x" * 1_001}, "source"),
        ({"source": "a\x00b"}, "source holds a NUL"),
        ({"source": "\ud800"}, "half a surrogate"),
        ({"source": ["x"]}, "source is a list"),
        ({"source": 7}, "source is 7"),
        ({"correlation_id": ""}, "correlationid"),
        ({"correlation_id": 7}, "correlationid"),
        ({"correlation_id": "\ud800"}, "half a surrogate"),
        ({"extensions": {"Name": 1}}, "no free CloudEvents attribute name"),
        ({"extensions": {"data": 1}}, "no free CloudEvents attribute name"),
        ({"extensions": {1: "x"}}, "no free CloudEvents attribute name"),
        ({"extensions": {b"a": "x"}}, "no free CloudEvents attribute name"),
        ({"extensions": [("a", "b")]}, "extensions are a list; they must be a mapping"),
        ({"extensions": "ab"}, "extensions are 'ab'; they must be a mapping"),
        ({"extensions": {"a" * 21: 1}}, "no free CloudEvents attribute name"),
        ({"extensions": {"a": None}}, "CloudEvents attributes are"),
        ({"extensions": {"a": 1.5}}, "CloudEvents attributes are"),
        ({"extensions": {"a": {}}}, "CloudEvents attributes are"),
        ({"extensions": {"a": 2**31}}, "CloudEvents attributes are"),
        ({"extensions": {"a": "\x00"}}, "NUL"),
        ({"extensions": {"a": "x" * 1_001}}, "1,000 characters"),
        ({"extensions": {f"a{n}": 1 for n in range(33)}}, "33 extensions"),
    ]
    for option, reason in options:
        with pytest.raises(InvalidPayload, match=reason):
            encoded(OrderNoted(1), **option)


EXTENSION = TEXT | st.booleans() | st.integers(-(2**31), 2**31 - 1)


@given(st.dictionaries(st.text("ab1", min_size=1, max_size=20), EXTENSION, max_size=8))
def test_extensions_arrive_as_they_were_given(extensions: dict[str, Any]) -> None:
    envelope = encoded(OrderNoted(1), extensions=extensions)
    arrived = decode(envelope.body).extensions
    assert {name: (type(value), value) for name, value in arrived.items()} == {
        name: (type(value), value) for name, value in extensions.items()
    }


def test_what_is_one_byte_too_large_is_refused() -> None:
    size = len(encoded(OrderNoted(1, "x" * 1_000)).body)
    limits = Limits(size=size)
    assert len(encoded(OrderNoted(1, "x" * 1_000), limits=limits).body) <= size
    with pytest.raises(PayloadTooLarge, match="claim check"):
        encoded(OrderNoted(1, "x" * 1_010), limits=limits)


@given(st.integers(55, 70), st.integers(99_900, 100_010))
def test_what_is_published_is_within_the_readers_limits(depth: int, nodes: int) -> None:
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    for value in (deep, [0] * nodes):
        try:
            envelope = encoded(Anything(value=value), extensions={f"a{n}": n for n in range(32)})
        except InvalidPayload:
            continue
        assert decode(envelope.body) == envelope


# ---- what arrives ----


def message(**changes: Any) -> bytes:
    attributes = {
        "specversion": "1.0",
        "id": str(new_id()),
        "source": "elsewhere",
        "type": "order.noted",
        "time": "2026-01-02T03:04:05Z",
        "data": {"number": 1},
        **changes,
    }
    return json.dumps({k: v for k, v in attributes.items() if v is not ...}).encode()


def test_a_strangers_envelope_is_read_with_what_it_has() -> None:
    envelope = decode(
        message(time="2026-01-02T04:04:05+01:00", traceparent="00-1", sampled=True, dropped=None)
    )
    assert envelope.version == 1
    assert envelope.time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert envelope.time.tzinfo is UTC
    assert (envelope.key, envelope.correlation_id, envelope.causation_id) == (None, None, None)
    assert envelope.extensions == {"traceparent": "00-1", "sampled": True}
    assert read(envelope) == OrderNoted(1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"specversion": "0.3"}, "specversion is '0.3'"),
        ({"specversion": ...}, "specversion is None"),
        ({"data": ...}, "no data"),
        ({"id": ...}, "id is None"),
        ({"id": "not a uuid"}, "id is 'not a uuid', not a UUID"),
        ({"id": 7}, "id is 7"),
        ({"source": ""}, "source is ''"),
        ({"source": ["x"]}, "source is a list"),
        ({"type": None}, "type is None"),
        ({"type": "x" * 1_000_000}, "type is 'x"),
        ({"time": ...}, "time is None"),
        ({"time": "yesterday"}, "time is 'yesterday'"),
        ({"time": "2026-01-02T03:04:05"}, "it has no zone"),
        ({"time": "0001-01-01T00:00:00+23:59"}, "time is '0001"),
        ({"eventversion": 0}, "eventversion is 0"),
        ({"eventversion": True}, "eventversion is True"),
        ({"eventversion": "1"}, "eventversion is '1'"),
        ({"eventversion": 2**31}, "eventversion is 2147483648"),
        ({"eventversion": 10**300}, "eventversion is 1000"),
        ({"causationid": "x"}, "causationid is 'x'"),
        ({"partitionkey": ""}, "partitionkey is ''"),
        ({"correlationid": {}}, "correlationid is a dict"),
        ({"sagaid": ["x"]}, "extension 'sagaid' is a list"),
        ({"ratio": 1.5}, "extension 'ratio' is 1.5"),
    ],
)
def test_an_envelope_with_a_wrong_attribute_is_refused_by_name(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MalformedMessage, match=reason) as refused:
        decode(message(**changes))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"1", pickle.dumps({"specversion": "1.0"})])  # fmt: skip
def test_what_is_no_envelope_at_all_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.uuids().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)  # fmt: skip
NAMES = st.sampled_from(
    [
        *("specversion", "id", "source", "type", "eventversion", "time", "partitionkey"),
        *("correlationid", "causationid", "data", "x"),
    ]
)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_whatever_an_attribute_is_replaced_by_is_read_or_refused_and_nothing_else(
    changes: dict[str, Any],
) -> None:
    try:
        envelope = decode(message(**changes))
        read(envelope)
    except MalformedMessage:
        return
    assert isinstance(envelope.data, dict)


@given(st.data())
def test_a_damaged_body_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    body = bytearray(encoded(OrderNoted(7, "näme")).body)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        read(decode(bytes(body)))
    except MalformedMessage:
        return
