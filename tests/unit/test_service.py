"""Wiring handlers: what is refused at import, and which handler an event is for."""

from __future__ import annotations

from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from outbox.errors import ConfigurationError
from outbox.events import Registry
from outbox.service import Handler, RetryPolicy, Service


class Placed(BaseModel):
    order: str


class Paid(BaseModel):
    order: str


@pytest.fixture
def billing() -> Service:
    registry = Registry()
    registry.event("order.placed")(Placed)
    registry.event("order.paid", version=2)(Paid)
    return Service("billing", registry=registry)


def bill(event: Any, session: Any) -> None: ...


def remind(event: Any, session: Any) -> None: ...


def test_a_handler_is_named_after_its_service_and_function(billing: Service) -> None:
    assert billing.on(Placed)(bill) is bill

    assert [handler.name for handler in billing.handlers] == ["billing.bill"]


def test_a_handler_keeps_the_name_it_is_given(billing: Service) -> None:
    billing.on(Placed, name="billing.charge")(bill)

    assert billing.handler("billing.charge") is not None
    assert billing.handler("billing.bill") is None


def test_an_event_is_for_every_handler_of_its_type(billing: Service) -> None:
    billing.on(Placed, Paid)(bill)
    billing.on(Paid)(remind)

    assert [h.name for h in billing.handlers_for("order.placed")] == ["billing.bill"]
    assert [h.name for h in billing.handlers_for("order.paid")] == [
        "billing.bill",
        "billing.remind",
    ]
    assert list(billing.handlers_for("order.lost")) == []


def test_a_handler_that_does_not_hear_itself_takes_what_others_publish() -> None:
    billing = Service("billing")
    handler = Handler(
        name="billing.note",
        event_types=frozenset({"order.placed"}),
        run=lambda *_: None,
        hears_itself=False,
    )
    billing.add(handler)
    assert list(billing.handlers_for("order.placed")) == [handler]
    assert list(billing.handlers_for("order.placed", "shop")) == [handler]
    assert list(billing.handlers_for("order.placed", "billing")) == []


def test_the_queue_is_bound_to_what_handlers_subscribe_to(billing: Service) -> None:
    billing.on(Placed)(bill)
    billing.add(Handler("billing.timer", frozenset({"order.paid"}), remind, subscribes=False))

    assert billing.bindings == ["order.placed"]
    assert list(billing.handlers_for("order.paid")) == []


def test_a_handler_takes_the_version_of_the_class_it_names(billing: Service) -> None:
    billing.on(Paid)(bill)

    assert billing.handlers[0].versions == {("order.paid", 2)}


def test_two_handlers_of_one_name_are_refused(billing: Service) -> None:
    billing.on(Placed)(bill)

    with pytest.raises(ConfigurationError, match=r"two handlers named billing\.bill"):
        billing.on(Paid)(bill)


def test_a_class_that_is_no_event_is_refused(billing: Service) -> None:
    class Unknown(BaseModel): ...

    with pytest.raises(ConfigurationError, match="is no event type"):
        billing.on(Unknown)


def test_a_handler_of_no_event_is_refused(billing: Service) -> None:
    with pytest.raises(ConfigurationError, match="takes no event"):
        billing.on()(bill)


def test_a_coroutine_is_refused(billing: Service) -> None:
    async def later(event: Any, session: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="is async"):
        billing.on(Placed)(later)  # type: ignore[arg-type]


def test_a_function_that_cannot_take_event_and_session_is_refused(billing: Service) -> None:
    with pytest.raises(ConfigurationError, match=r"must take \(event, session\)"):
        billing.on(Placed)(lambda event: None)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("name", ["", "Billing", "1st", "a b", "a.b", "x" * 64])
def test_a_name_that_cannot_name_a_queue_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a service"):
        Service(name)


@pytest.mark.parametrize("name", ["", "a b", "*", "x" * 201])
def test_a_name_that_cannot_name_a_handler_is_refused(billing: Service, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a handler"):
        billing.add(Handler(name, frozenset({"order.placed"}), bill))


def test_the_queue_is_named_after_the_service(billing: Service) -> None:
    assert (billing.queue, billing.exchange) == ("billing.events", "events")


# ---- how long to wait ----


@given(
    attempt=st.integers(1, 200),
    first=st.floats(0, 100),
    more=st.floats(0, 10_000),
    seed=st.integers(),
)
def test_no_wait_is_longer_than_its_bound(
    attempt: int, first: float, more: float, seed: int
) -> None:
    policy = RetryPolicy(first=timedelta(seconds=first), cap=timedelta(seconds=first + more))

    delay = policy.delay(attempt, Random(seed))

    assert timedelta(0) <= delay <= policy.cap
    if attempt < 20:
        assert delay <= policy.first * 2 ** (attempt - 1)


def test_waits_are_spread_over_all_of_their_range() -> None:
    policy, random = RetryPolicy(first=timedelta(seconds=10)), Random(1)

    waits = [policy.delay(1, random).total_seconds() for _ in range(200)]

    assert min(waits) < 1
    assert max(waits) > 9


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"first": timedelta(seconds=-1)},
        {"first": timedelta(seconds=2), "cap": timedelta(seconds=1)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="attempts must be 1 or more"):
        RetryPolicy(**wrong)
