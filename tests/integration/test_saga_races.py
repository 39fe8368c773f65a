"""Two transactions of one saga at once: the second waits for the saga's row, then does what is right."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox.receive import ReceiveSettings
from outbox.work import TransactionLimits
from saga import AlreadyStarted
from saga.testing.choreography import Message
from tests.overlapping import StoppingParticipant, overlap
from tests.sagas import OrderCreated, Shop, check_whole


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@pytest.fixture
def shop(engine: Engine) -> Shop:
    return Shop(engine, StoppingParticipant)


def overlapping(shop: Shop, first: Message, second: Message, *, after: str) -> bool:
    return overlap(
        shop.engine,
        lambda: shop.play.deliver(first),
        lambda: shop.play.deliver(second),
        after=after,
    )


def test_an_abort_during_a_step_waits_for_it_and_has_it_compensated(engine: Engine) -> None:
    shop = Shop(engine, StoppingParticipant, unwind="eager")
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    step = shop.message("order.created", "inventory")
    abort = shop.message("saga.aborted", "inventory")
    assert overlapping(shop, step, abort, after="record")
    assert shop.steps(saga_id)["inventory.act"] == "compensating"
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"


def test_an_abort_during_a_step_that_fails_leaves_a_tombstone_for_its_retry(shop: Shop) -> None:
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    step = shop.message("order.created", "inventory")
    abort = shop.message("saga.aborted", "inventory")
    shop.failures["inventory.do"] = 1
    assert overlapping(shop, step, abort, after="lock")
    assert shop.states(saga_id)["inventory"] == "compensated"
    shop.play.settle()
    assert shop.steps(saga_id)["inventory.act"] == "skipped"
    assert check_whole(shop, saga_id) == "compensated"


def test_a_trigger_during_the_abort_waits_for_the_tombstone_and_does_nothing(shop: Shop) -> None:
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    step = shop.message("order.created", "inventory")
    abort = shop.message("saga.aborted", "inventory")
    assert overlapping(shop, abort, step, after="move")
    assert "inventory.do" not in shop.effects(saga_id)
    assert shop.steps(saga_id)["inventory.act"] == "skipped"


def test_the_last_two_arrivals_at_once_fire_the_join_once(shop: Shop) -> None:
    saga_id = shop.start()
    for branch in ("inventory", "users", "shipping"):
        shop.deliver("order.created", branch)
    shop.deliver("stock.reserved", "order")
    points, shipment = (
        shop.message("points.added", "order"),
        shop.message("shipment.created", "order"),
    )
    assert overlapping(shop, points, shipment, after="arrivals")
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"


@pytest.mark.parametrize("first", ["join", "abort"])
def test_a_join_and_an_abort_at_once_have_one_winner(shop: Shop, first: str) -> None:
    saga_id = shop.start()
    for branch in ("inventory", "users", "shipping"):
        shop.deliver("order.created", branch)
    shop.deliver("stock.reserved", "order")
    shop.deliver("points.added", "order")
    join = shop.message("shipment.created", "order")
    abort = forged_abort(shop, saga_id)
    pair = (join, abort) if first == "join" else (abort, join)
    assert overlapping(shop, *pair, after="move")
    end = "completed" if first == "join" else "compensating"
    assert shop.states(saga_id)["order"] == end
    assert ("order.confirm" in shop.effects(saga_id)) is (first == "join")


def test_two_starts_with_one_id_at_once_make_one_saga(shop: Shop) -> None:
    saga_id = uuid4()
    outcomes: Counter[str] = Counter()

    def start() -> None:
        with Session(shop.engine) as session, session.begin():
            try:
                shop.order.start(session, OrderCreated("o1"), saga_id=saga_id)
                outcomes["started"] += 1
            except AlreadyStarted:
                outcomes["refused"] += 1

    assert overlap(shop.engine, start, start, after="open")
    assert outcomes == {"started": 1, "refused": 1}
    assert shop.published(saga_id) == {"order.created": 1}


def test_two_compensations_that_end_at_once_leave_one_saga_compensated(engine: Engine) -> None:
    shop = two_steps_in_one_participant(engine)
    saga_id = shop.start("users")
    for one in [one for one in shop.play.collect() if one.service == "packing"]:
        shop.play.deliver(one)
    shop.deliver("order.created", "users")
    shop.deliver("saga.aborted", "packing")
    first, second = (one for one in shop.play.collect() if one.handler and "packing" in one.handler)
    assert overlapping(shop, first, second, after="runs")
    assert shop.states(saga_id)["packing"] == "compensated"
    undone = [
        one.data["pending"]
        for one in shop.log()
        if one.type == "saga.undone"
        and (one.data["saga_id"], one.data["participant"]) == (str(saga_id), "packing")
    ]
    assert [len(pending) for pending in undone] == [2, 1, 0]


def test_a_compensation_that_hangs_holds_up_no_other_of_the_same_participant(
    engine: Engine,
) -> None:
    shop = two_steps_in_one_participant(engine)
    saga_id = shop.start("users")
    for one in [one for one in shop.play.collect() if one.service == "packing"]:
        shop.play.deliver(one)
    shop.deliver("order.created", "users")
    shop.deliver("saga.aborted", "packing")
    hanging, other = (
        one for one in shop.play.collect() if one.handler and "packing" in one.handler
    )
    assert not overlapping(shop, hanging, other, after="claim")
    assert shop.states(saga_id)["packing"] == "compensated"


def test_waiting_too_long_for_a_slow_step_puts_the_delivery_off_and_costs_no_attempt(
    engine: Engine,
) -> None:
    limits = TransactionLimits(lock=timedelta(milliseconds=100))
    shop = Shop(engine, StoppingParticipant, ReceiveSettings(transaction=limits))
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    step = shop.message("order.created", "inventory")
    abort = shop.message("saga.aborted", "inventory")
    outcomes: list[str] = []

    def let_the_abort_come(what: str) -> None:
        if what == "inventory.do":
            outcomes.append(str(shop.play.deliver(abort)))

    shop.before = let_the_abort_come
    shop.play.deliver(step)
    assert outcomes == ["inventory.saga.aborted busy"]
    (owed,) = (one for one in shop.play.collect() if one.handler == "inventory.saga.aborted")
    (row,) = shop.rows(
        "SELECT attempts FROM outbox.pending_delivery WHERE event_id = :id", id=owed.event_id
    )
    assert row.attempts == 0
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"


def two_steps_in_one_participant(engine: Engine) -> Shop:
    """The shop, with a participant that answers the order twice."""
    shop = Shop(engine, StoppingParticipant)
    packing = StoppingParticipant("packing", registry=shop.registry)
    for name in ("box", "label"):

        @packing.step(on=OrderCreated, name=name)
        def act(created: OrderCreated, session: Session) -> None: ...

        @act.compensation
        def undo(created: OrderCreated, session: Session) -> None: ...

    shop.participants = (*shop.participants, packing)
    shop.reset()
    return shop


def forged_abort(shop: Shop, saga_id: UUID) -> Message:
    """An abort of the saga for the order participant, as a deadline or a person would publish it."""
    other = shop.start("users")
    shop.deliver("order.created", "users")
    aborted = shop.message("saga.aborted", "order")
    body = aborted.body.replace(str(other).encode(), str(saga_id).encode())
    return Message("order", aborted.type, aborted.event_id, body)
