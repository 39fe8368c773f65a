"""What can be declared, and that what is declared wrongly is refused with its file and line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from outbox.errors import ConfigurationError
from outbox.events import Registry
from saga import Participant, Reject
from saga.choreography import EventRef
from saga.control import CONTROL_EVENTS

HERE = "test_saga_declarations.py:"


@dataclass(frozen=True)
class Ordered:
    id: str


@dataclass(frozen=True)
class Reserved:
    id: str


@dataclass(frozen=True)
class Refused:
    id: str


@dataclass(frozen=True)
class Unregistered:
    id: str


@pytest.fixture
def stock() -> Participant:
    registry = Registry()
    for name, cls in {"o.ordered": Ordered, "o.reserved": Reserved, "o.refused": Refused}.items():
        registry.event(name, key="id")(cls)
    return Participant("stock", registry=registry)


def of_one(event: Any, session: Any) -> Any: ...


def of_two(event: Any, other: Any, session: Any) -> Any: ...


async def asynchronous(event: Any, session: Any) -> Any: ...


Declare = Callable[[Participant], object]
MISTAKES: dict[str, tuple[Declare, str]] = {
    "a trigger that is no event": (
        lambda p: p.step(on=Unregistered)(of_one),
        "Unregistered is no event type",
    ),
    "an emitted event that is not registered": (
        lambda p: p.step(on=Ordered, emits=Unregistered)(of_one),
        "Unregistered is no event type",
    ),
    "a rejection that is not registered": (
        lambda p: p.step(on=Ordered, rejects=(Refused, Unregistered))(of_one),
        "Unregistered is no event type",
    ),
    "an old name that is the name": (
        lambda p: p.step(on=Ordered, name="one", was="one")(of_one),
        "names it as it is now, or twice",
    ),
    "an old name that is none": (
        lambda p: p.step(on=Ordered, was="one.two")(of_one),
        "'one.two' cannot be a name",
    ),
    "an old name that another step has": (
        lambda p: (p.step(on=Ordered, name="a")(of_one), p.step(on=Ordered, was="a")(of_one)),
        "has a step named a already",
    ),
    "a name that another step had": (
        lambda p: (
            p.step(on=Ordered, was="a")(of_one),
            p.step(on=Reserved, name="a")(of_one),
        ),
        "has a step that was a already",
    ),
    "a step that takes other parameters": (
        lambda p: p.step(on=Ordered)(of_two),
        "must take (o_ordered, session)",
    ),
    "a join that takes other parameters": (
        lambda p: p.join(Ordered, Reserved)(of_one),
        "must take (o_ordered, o_reserved, session)",
    ),
    "a step that is asynchronous": (lambda p: p.step(on=Ordered)(asynchronous), "is async"),
    "a join of nothing": (lambda p: p.join()(of_one), "waits for no event"),
    "a join that names an event twice": (
        lambda p: p.join(Ordered, Ordered)(of_two),
        "names o.ordered v1 twice",
    ),
    "a name that cannot be stored": (
        lambda p: p.step(on=Ordered, name="a b")(of_one),
        "cannot be a name",
    ),
    "an outcome that does not exist": (
        lambda p: p.step(on=Ordered, exhausted="retry")(of_one),  # type: ignore[arg-type]
        "it can be 'stuck' or 'abort'",
    ),
    "nothing to undo without a reason": (
        lambda p: p.step(on=Ordered, nothing_to_undo=" ")(of_one),
        "nothing_to_undo needs the reason",
    ),
    "no deadline without a reason": (
        lambda p: p.join(Ordered, completes=True, no_deadline=" ")(of_one),
        "no_deadline needs the reason",
    ),
    "no deadline where nothing is decided": (
        lambda p: p.step(on=Ordered, no_deadline="patience")(of_one),
        "decides no saga",
    ),
    "a start with an event that is not registered": (
        lambda p: p.starts(Unregistered),
        "Unregistered is no event type",
    ),
    "a compensation that takes other parameters": (
        lambda p: p.step(on=Ordered, emits=Reserved)(of_one).compensation(of_one),
        "must take (o_ordered, emitted, session)",
    ),
    "a compensation of a start that takes other parameters": (
        lambda p: p.compensation(Ordered)(of_two),
        "must take (o_ordered, session)",
    ),
    "a compensation where nothing is to undo": (
        lambda p: p.step(on=Ordered, nothing_to_undo="it reads")(of_one).compensation(of_one),
        "a compensation contradicts that",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_at_import_with_its_place(stock: Participant, mistake: str) -> None:
    declare, message = MISTAKES[mistake]
    with pytest.raises(ConfigurationError) as refused:
        declare(stock)
    assert HERE in str(refused.value)
    assert message in str(refused.value)


def test_two_reactions_of_one_name_are_refused_with_both_places(stock: Participant) -> None:
    stock.step(on=Ordered, name="act")(of_one)
    with pytest.raises(ConfigurationError) as refused:
        stock.join(Ordered, Reserved, name="act")(of_two)
    assert str(refused.value).count(HERE) == 2


def test_a_step_named_like_a_plain_handler_is_refused(stock: Participant) -> None:
    stock.on(Ordered)(of_one)
    with pytest.raises(ConfigurationError) as refused:
        stock.step(on=Ordered)(of_one)
    assert HERE in str(refused.value)
    assert "handler named stock.of_one" in str(refused.value)


def test_a_second_compensation_is_refused_with_the_place_of_the_first(stock: Participant) -> None:
    step = stock.step(on=Ordered)(of_one)

    @step.compensation
    def undo(event: Ordered, session: Any) -> None: ...

    with pytest.raises(ConfigurationError) as refused:
        step.compensation(of_one)
    assert f"{HERE}{undo.__code__.co_firstlineno}" in str(refused.value)


def test_a_second_start_by_one_event_is_refused(stock: Participant) -> None:
    stock.starts(Ordered)
    with pytest.raises(ConfigurationError, match=r"has a start named start:o\.ordered already"):
        stock.compensation(Ordered)


def test_a_declared_step_can_be_called_like_the_function_that_it_is(stock: Participant) -> None:
    @stock.step(on=Ordered, emits=Reserved, rejects=Refused)
    def reserve(order: Ordered, session: object) -> Reserved:
        if order.id == "none":
            raise Reject(Refused(order.id), reason="none left")
        return Reserved(order.id)

    assert reserve(Ordered("1"), object()) == Reserved("1")
    with pytest.raises(Reject, match="none left") as rejected:
        reserve(Ordered("none"), object())
    assert rejected.value.event == Refused("none")


def test_the_spec_tells_what_was_declared_and_where(stock: Participant) -> None:
    @stock.step(on=Ordered, emits=(Reserved, Refused), exhausted="abort")
    def reserve(order: Ordered, session: object) -> Reserved: ...

    @reserve.compensation
    def release(order: Ordered, emitted: object, session: object) -> None: ...

    @stock.join(Ordered, Reserved, completes=True, nothing_to_undo="it decides")
    def confirm(order: Ordered, reserved: Reserved, session: object) -> None: ...

    stock.starts(Refused, nothing_to_undo="nothing is written")
    spec = stock.spec
    (step,), (join,), (start,) = spec.steps, spec.joins, spec.starts
    assert (step.participant, step.name, step.on) == ("stock", "reserve", EventRef("o.ordered", 1))
    assert step.emits == (EventRef("o.reserved", 1), EventRef("o.refused", 1))
    assert step.exhausted == "abort"
    assert step.place.file == __file__
    assert step.compensation is not None
    assert step.compensation.line == release.__code__.co_firstlineno
    assert join.completes
    assert (join.nothing_to_undo, join.compensation) == ("it decides", None)
    assert (start.event, start.nothing_to_undo) == (EventRef("o.refused", 1), "nothing is written")


def test_a_participant_is_bound_to_its_triggers_and_to_what_decides_a_saga(
    stock: Participant,
) -> None:
    stock.step(on=Ordered)(of_one)
    stock.on(Refused, name="stock.watch")(of_one)
    decisions = ["saga.aborted", "saga.completed", "saga.introduced", "saga.undone"]
    assert stock.bindings == ["o.ordered", "o.refused", *decisions]
    assert stock.subscriptions == ["o.refused"]


def test_participants_share_a_registry_that_knows_the_control_events_once() -> None:
    registry = Registry()
    Participant("one", registry=registry)
    Participant("two", registry=registry)
    assert set(registry.names()) == {event_type.name for event_type in CONTROL_EVENTS}
