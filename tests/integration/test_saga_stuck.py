"""The unknown outcome: retried, then stuck and visible with its reason, then resumed by a redrive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import dead_letters, quarantine
from outbox.dead_letters import Matching
from saga import Participant, Reject
from tests.sagas import TWICE, Broken, OrderCreated, Shop, StockRejected, StockReserved, check_whole


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@pytest.fixture
def shop(engine: Engine) -> Shop:
    shop = Shop(engine)
    shop.run("DELETE FROM outbox.dead_letter")
    return shop


def redrive(shop: Shop) -> int:
    """What a person does once the cause is gone; returns how many dead letters there were."""
    with Session(shop.engine) as session, session.begin():
        count = dead_letters.redrive(session, Matching())
    shop.play.settle()
    return count


def reason(shop: Shop, saga_id: UUID, step: str) -> str:
    (row,) = shop.rows(
        "SELECT reason FROM outbox.saga_step WHERE saga_id = :id AND step = :step "
        "AND state LIKE '%stuck'",
        id=saga_id, step=step,
    )  # fmt: skip
    return str(row.reason)


def test_a_step_that_fails_once_is_retried_and_compensates_nothing(shop: Shop) -> None:
    shop.failures["inventory.do"] = 1
    saga_id = shop.start()
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"
    assert "saga.aborted" not in shop.published(saga_id)


def test_a_step_that_keeps_failing_leaves_the_saga_stuck_until_it_is_redriven(shop: Shop) -> None:
    shop.failures["inventory.do"] = 2
    saga_id = shop.start()
    shop.play.settle()
    assert shop.states(saga_id)["inventory"] == "running stuck"
    assert reason(shop, saga_id, "act") == "Broken: inventory.do is broken"
    assert shop.published(saga_id)["saga.stuck"] == 1
    assert "saga.aborted" not in shop.published(saga_id)
    assert redrive(shop) == 1
    assert check_whole(shop, saga_id) == "completed"


def test_a_redrive_that_fails_again_stays_stuck_with_the_newer_reason(shop: Shop) -> None:
    shop.failures["inventory.do"] = 4
    saga_id = shop.start()
    shop.play.settle()
    redrive(shop)
    assert shop.states(saga_id)["inventory"] == "running stuck"
    redrive(shop)
    assert check_whole(shop, saga_id) == "completed"


def test_a_stuck_step_that_rejects_when_redriven_aborts_the_saga(shop: Shop) -> None:
    shop.failures["users.do"] = 2
    saga_id = shop.start("users")
    shop.play.settle()
    assert shop.states(saga_id)["users"] == "running stuck"
    redrive(shop)
    assert check_whole(shop, saga_id) == "compensated"


def test_an_abort_calls_off_a_stuck_step_and_its_redrive_does_nothing(shop: Shop) -> None:
    shop.failures["inventory.do"] = 2
    saga_id = shop.start("shipping")
    shop.deliver("order.created", "inventory")
    for _ in range(2):
        shop.play.collect()
        for one in [one for one in shop.play.waiting if one.handler]:
            shop.play.deliver(one)
    assert shop.states(saga_id)["inventory"] == "running stuck"
    shop.play.settle()
    assert shop.steps(saga_id)["inventory.act"] == "skipped"
    assert redrive(shop) == 1
    assert check_whole(shop, saga_id) == "compensated"


def test_a_join_that_keeps_failing_is_stuck_and_completes_when_it_is_redriven(shop: Shop) -> None:
    shop.failures["order.confirm"] = 2
    saga_id = shop.start()
    shop.play.settle()
    assert shop.states(saga_id)["order"] == "running stuck"
    assert reason(shop, saga_id, "confirm") == "Broken: order.confirm is broken"
    arrived = shop.rows(
        "SELECT type FROM outbox.saga_join_arrival WHERE saga_id = :id AND \"join\" = 'confirm'",
        id=saga_id,
    )
    assert {row.type for row in arrived} == {"stock.reserved", "points.added", "shipment.created"}
    redrive(shop)
    assert check_whole(shop, saga_id) == "completed"


def test_a_compensation_that_keeps_failing_is_stuck_while_the_others_go_on(shop: Shop) -> None:
    shop.failures["inventory.undo"] = 2
    saga_id = shop.start("shipping")
    for branch in ("inventory", "users", "shipping"):
        shop.deliver("order.created", branch)
    shop.play.settle()
    assert shop.states(saga_id) == {
        "order": "compensating",
        "inventory": "compensating stuck",
        "users": "compensated",
        "shipping": "compensated",
    }
    assert reason(shop, saga_id, "act") == "Broken: inventory.undo is broken"
    assert redrive(shop) == 1
    assert check_whole(shop, saga_id) == "compensated"


def test_a_step_that_may_be_given_up_aborts_the_saga_instead_of_being_stuck(shop: Shop) -> None:
    hasty = Participant("hasty", registry=shop.registry, retry=TWICE)

    @hasty.step(on=OrderCreated, exhausted="abort", nothing_to_undo="it only looks something up")
    def look(created: OrderCreated, session: Session) -> None:
        raise Broken("no answer")

    saga_id = with_participant(shop, hasty).start()
    shop.play.settle(lambda waiting: next((m for m in waiting if m.service == "hasty"), waiting[0]))
    assert set(shop.states(saga_id).values()) == {"compensated"}
    assert shop.steps(saga_id)["hasty.look"] == "rejected"


def test_a_step_without_a_compensation_is_stuck_until_it_has_one(shop: Shop) -> None:
    careless = Participant("careless", registry=shop.registry, compensation_retry=TWICE)

    @careless.step(on=OrderCreated)
    def act(created: OrderCreated, session: Session) -> None: ...

    saga_id = with_participant(shop, careless).start("users")
    shop.deliver("order.created", "careless")
    shop.play.settle()
    assert shop.states(saga_id)["careless"] == "compensating stuck"
    assert "has no compensation" in reason(shop, saga_id, "act")
    undone: list[str] = []

    @act.compensation
    def undo(created: OrderCreated, session: Session) -> None:
        undone.append(created.order)

    redrive(shop)
    assert undone == ["o1"]
    assert shop.states(saga_id)["careless"] == "compensated"


def test_a_step_with_nothing_to_undo_is_compensated_at_once_with_its_reason(shop: Shop) -> None:
    looker = Participant("looker", registry=shop.registry)

    @looker.step(on=OrderCreated, nothing_to_undo="it only reads")
    def look(created: OrderCreated, session: Session) -> None: ...

    saga_id = with_participant(shop, looker).start("users")
    shop.deliver("order.created", "looker")
    shop.play.settle()
    assert shop.states(saga_id)["looker"] == "compensated"
    (row,) = shop.rows(
        "SELECT state, reason FROM outbox.saga_step WHERE saga_id = :id AND participant = 'looker'",
        id=saga_id,
    )
    assert (row.state, row.reason) == ("compensated", "it only reads")


@pytest.mark.parametrize("answer", ["wrong event", "no event", "undeclared rejection"])
def test_an_answer_that_is_not_declared_is_an_unknown_outcome(shop: Shop, answer: str) -> None:
    liar = Participant("liar", registry=shop.registry, retry=TWICE)

    @liar.step(on=OrderCreated, emits=StockReserved, nothing_to_undo="a test")
    def act(created: OrderCreated, session: Session) -> Any:
        shop._write(session, saga_id, "liar.do")
        if answer == "undeclared rejection":
            raise Reject(StockRejected(created.order))
        return StockRejected(created.order) if answer == "wrong event" else None

    saga_id = with_participant(shop, liar).start()
    for one in [one for one in shop.play.collect() if one.service == "liar"]:
        shop.play.deliver(one)
    shop.play.settle()
    assert shop.states(saga_id)["liar"].endswith("stuck")
    assert "it declares" in reason(shop, saga_id, "act")
    assert "liar.do" not in shop.effects(saga_id)
    assert "saga.aborted" not in shop.published(saga_id)


def test_a_rejection_after_the_decision_is_stuck_and_aborts_nobody(shop: Shop) -> None:
    late = Participant("late", registry=shop.registry, retry=TWICE)

    @late.step(on=OrderCreated, rejects=StockRejected, nothing_to_undo="a test")
    def act(created: OrderCreated, session: Session) -> None:
        raise Reject(StockRejected(created.order))

    saga_id = with_participant(shop, late).start()
    trigger = shop.message("order.created", "late")
    shop.play.waiting.remove(trigger)
    shop.play.settle()
    shop.play.deliver(trigger)
    shop.play.settle()
    assert shop.states(saga_id)["late"] == "completed stuck"
    assert "the completing join must wait" in reason(shop, saga_id, "act")
    assert "saga.aborted" not in shop.published(saga_id)


def test_an_event_outside_of_any_saga_that_reaches_a_step_is_parked_with_what_to_do(
    shop: Shop,
) -> None:
    with Session(shop.engine) as session, session.begin():
        shop.order.publish(session, OrderCreated("o1"))
    shop.play.settle()
    parked = shop.rows("SELECT handler, error FROM outbox.dead_letter")
    assert {row.handler for row in parked} == {"inventory.act", "users.act", "shipping.act"}
    assert all("participant.start(session, event)" in row.error for row in parked)


def test_a_trigger_that_cannot_be_read_leaves_the_saga_stuck_until_it_is_fed_through(
    shop: Shop,
) -> None:
    saga_id = shop.start()
    trigger = shop.message("order.created", "inventory")
    unreadable = replace(trigger, body=trigger.body.replace(b'"order":"o1"', b'"order":17'))
    shop.play.waiting[shop.play.waiting.index(trigger)] = unreadable
    shop.play.settle()
    assert shop.states(saga_id)["inventory"] == "running stuck"
    assert reason(shop, saga_id, "act").startswith("MalformedMessage")
    assert shop.published(saga_id)["saga.stuck"] == 1
    (kept,) = shop.rows("SELECT id FROM outbox.quarantine")
    shop.run("UPDATE outbox.quarantine SET body = :body, digest = sha256(:body)", body=trigger.body)
    with Session(shop.engine) as session, session.begin():
        assert quarantine.redrive(session, kept.id)
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"


def with_participant(shop: Shop, participant: Participant) -> Shop:
    shop.participants = (*shop.participants, participant)
    shop.reset()
    return shop
