"""Contracts: what is written is what is read, services of separate repositories are checked
together, and a file that is none is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from outbox.errors import ConfigurationError
from outbox.events import Registry
from saga import Participant
from saga.check import check
from saga.contract import FORMAT, Contract, contract_of, read_contract, to_json
from saga.findings import Finding
from tests.unit.saga_stage import A, Stage, anything, source_of
from tests.unit.test_saga_check_rules import whole


@dataclass(frozen=True)
class Done:
    id: str


@dataclass(frozen=True)
class TooLate:
    id: str


@dataclass(frozen=True)
class Placed:
    id: str
    amount: int


@dataclass(frozen=True)
class PlacedInMoney:
    id: str
    amount: int
    currency: str


def orders(placed: type = Placed, version: int = 1, *, ordered: bool = False) -> Participant:
    """The repository that says order.placed."""
    registry = Registry()
    registry.event("order.placed", version=version, key="id", ordered=ordered)(placed)
    registry.event("work.done", key="id")(Done)
    registry.event("order.too_late", key="id")(TooLate)
    order = Participant("order", registry=registry)
    order.starts(placed, nothing_to_undo="nothing is written")
    order.join(Done, completes=True, name="end")(anything)
    order.deadline(minutes=15, rejects=TooLate, name="too_late")(anything)
    return order


def work(placed: type = Placed, version: int = 1, *, ordered: bool = False) -> Participant:
    """The repository that takes order.placed."""
    registry = Registry()
    registry.event("order.placed", version=version, key="id", ordered=ordered)(placed)
    registry.event("work.done", key="id")(Done)
    service = Participant("work", registry=registry)
    service.step(on=placed, emits=Done, name="work")(anything).compensation(anything)  # taken here
    return service


def carried(service: Participant, directory: Path) -> Contract:
    """The contract as another repository gets it: through a file."""
    path = directory / f"{service.name}.json"
    path.write_text(to_json(contract_of(service)), encoding="utf-8")
    return read_contract(path)


def findings(directory: Path, *services: Participant) -> list[Finding]:
    return check([carried(service, directory) for service in services])


# ---- the file ----


def test_a_contract_is_read_as_it_was_written(tmp_path: Path) -> None:
    stage = Stage()
    whole(stage)
    stage.order.publishes(A)
    stage.order.on(A, name="hear")(lambda event, session: None)
    for contract in stage.contracts():
        path = tmp_path / "contract.json"
        path.write_text(to_json(contract), encoding="utf-8")
        again = read_contract(path)
        assert to_json(again) == to_json(contract)
        assert again.publishes == contract.publishes
        assert again.participant.steps == contract.participant.steps or contract.name == "stock"


def test_the_same_declarations_make_the_same_file() -> None:
    assert to_json(contract_of(orders())) == to_json(contract_of(orders()))


def test_a_contract_names_no_place_outside_of_the_repository() -> None:
    places = [start.place.file for start in contract_of(orders()).participant.starts]
    assert Path(places[0]).is_absolute()
    assert "tests/unit/test_saga_check_contracts.py" in to_json(contract_of(orders()))
    assert str(Path.cwd()) not in to_json(contract_of(orders()))


GARBAGE: dict[str, str | bytes] = {
    "empty": "",
    "no JSON": "not json",
    "cut off": '{"participant": {"name": "o',
    "a list": "[]",
    "a number": "7",
    "nothing in it": "{}",
    "no UTF-8": b"\xff\xfe\x00",
    "nested too deep": "[" * 100_000,
    "no participant": '{"format": 1, "events": []}',
    "another thing": '{"openapi": "3.1.0", "paths": {}}',
    "a later look of this format": '{"format": 1, "participant": 7, "events": 7}',
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_a_file_that_is_no_contract_is_refused_by_its_name(
    text: str | bytes, tmp_path: Path
) -> None:
    path = tmp_path / "garbage.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError, match=r"garbage\.json is no contract \(saga export"):
        read_contract(path)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["directory", "missing"])
def test_a_file_that_cannot_be_read_is_refused(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "contract.json"
    make(path)
    with pytest.raises(ConfigurationError, match=r"contract\.json cannot be read"):
        read_contract(path)


def test_a_contract_of_a_later_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "later.json"
    path.write_text(json.dumps({"format": FORMAT + 1, "whatever": "there is"}))
    with pytest.raises(ConfigurationError, match="upgrade outbox-saga"):
        read_contract(path)


SPOILED: dict[str, Any] = {
    "no mapping": 7,
    "properties are a list": {"properties": ["amount"]},
    "required is a number": {"required": 3, "properties": {}},
    "a reference to nothing": {"$ref": "#/$defs/Gone"},
    "a reference to itself": {"$ref": "#/$defs/X", "$defs": {"X": {"$ref": "#/$defs/X"}}},
    "options are text": {"anyOf": "abc"},
}


@pytest.mark.parametrize("schema", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_schema_in_a_contract_is_refused_or_found(schema: Any, tmp_path: Path) -> None:
    document = json.loads(to_json(contract_of(work())))
    for known in document["events"]:
        known["accepted"] = schema
    path = tmp_path / "work.json"
    path.write_text(json.dumps(document))
    try:
        spoiled = read_contract(path)
    except ConfigurationError as error:
        assert "work.json is no contract" in str(error)  # noqa: PT017 - either is right
    else:
        check([contract_of(orders()), spoiled])


# ---- together ----


def test_services_of_two_repositories_that_agree_have_nothing_to_say(tmp_path: Path) -> None:
    assert findings(tmp_path, orders(), work()) == []


def test_one_repository_alone_misses_what_the_other_says(tmp_path: Path) -> None:
    rules = {one.rule for one in findings(tmp_path, work())}
    assert "unproduced-event" in rules


def test_a_version_that_the_reader_does_not_know_is_found_where_it_is_taken(tmp_path: Path) -> None:
    (one,) = findings(tmp_path, orders(version=2), work())
    assert (one.rule, one.severity) == ("version", "error")
    assert "order.placed v2" in one.message
    assert "taken here" in source_of(one)


def test_a_version_that_an_upcaster_reads_is_no_finding(tmp_path: Path) -> None:
    reader = work(PlacedInMoney, 2)
    reader.registry.upcast("order.placed", from_version=1)(lambda data: {**data, "currency": "EUR"})
    assert findings(tmp_path, orders(), reader) == []


def test_a_version_that_is_read_but_not_taken_is_found(tmp_path: Path) -> None:
    reader = work()
    reader.registry.event("order.placed", version=2, key="id")(PlacedInMoney)
    reader.registry.upcast("order.placed", from_version=1)(lambda data: {**data, "currency": "EUR"})
    (one,) = findings(tmp_path, orders(), reader)
    assert one.rule == "version"
    assert "does not take" in one.message


def test_a_field_that_is_required_and_never_written_is_found(tmp_path: Path) -> None:
    (one,) = findings(tmp_path, orders(), work(PlacedInMoney))
    assert (one.rule, one.severity) == ("schema", "error")
    assert "currency is required and never written" in one.message
    assert "taken here" in source_of(one)


def test_a_field_that_the_reader_does_not_know_is_no_finding(tmp_path: Path) -> None:
    assert findings(tmp_path, orders(PlacedInMoney), work()) == []


def test_events_that_are_expected_in_order_and_written_without_are_found(tmp_path: Path) -> None:
    (one,) = findings(tmp_path, orders(), work(ordered=True))
    assert one.rule == "schema"
    assert "in order" in one.message


def test_what_is_published_plainly_is_compared_with_who_listens(tmp_path: Path) -> None:
    writer = orders()
    writer.registry.event("order.noted", key="id")(PlacedNote)
    writer.publishes(PlacedNote)
    reader = work()
    reader.registry.event("order.noted", key="id")(ReadNote)
    reader.on(ReadNote, name="hear")(lambda event, session: None)  # heard here
    (one,) = findings(tmp_path, writer, reader)
    assert one.rule == "schema"
    assert "heard here" in source_of(one)


@dataclass(frozen=True)
class PlacedNote:
    id: str
    note: int


@dataclass(frozen=True)
class ReadNote:
    id: str
    note: str


class Inner(BaseModel):
    kind: Literal["a", "b"] = "a"


class Tree(BaseModel):
    id: str
    inner: Inner = Inner()
    children: list[Tree] = []


class WiderInner(BaseModel):
    kind: Literal["a", "b", "c"] = "a"


class WiderTree(BaseModel):
    id: str
    inner: WiderInner = WiderInner()
    children: list[WiderTree] = []


def test_a_value_that_the_reader_does_not_know_is_found_inside_of_what_contains_itself(
    tmp_path: Path,
) -> None:
    assert findings(tmp_path, orders(Tree), work(Tree)) == []
    assert findings(tmp_path, orders(Tree), work(WiderTree)) == []
    (one,) = findings(tmp_path, orders(WiderTree), work(Tree))
    assert "inner.kind may be 'c', which is not known" in one.message


def test_a_contract_named_twice_is_found(tmp_path: Path) -> None:
    rules = {one.rule for one in findings(tmp_path, orders(), work(), work())}
    assert "same-name" in rules
