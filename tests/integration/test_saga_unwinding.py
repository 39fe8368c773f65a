"""Steps, rejections and unwinding on real PostgreSQL, in every order that one message can take."""

from __future__ import annotations

import logging
from itertools import permutations

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox.envelope import decode
from saga import AlreadyStarted
from tests.sagas import BRANCHES, OrderCreated, Shop, check_whole


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@pytest.fixture
def shop(engine: Engine) -> Shop:
    return Shop(engine)


@pytest.fixture
def eager(engine: Engine) -> Shop:
    return Shop(engine, unwind="eager")


def test_a_saga_that_nobody_rejects_is_completed_everywhere(shop: Shop) -> None:
    saga_id = shop.start()
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"
    assert shop.published(saga_id)["order.confirmed"] == 1


@pytest.mark.parametrize("rejecting", BRANCHES)
@pytest.mark.parametrize("order", list(permutations(BRANCHES)))
def test_one_rejection_undoes_all_branches_in_whatever_order_they_ran(
    shop: Shop, rejecting: str, order: tuple[str, ...]
) -> None:
    saga_id = shop.start(rejecting)
    for branch in order:
        shop.deliver("order.created", branch)
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"
    assert shop.steps(saga_id)[f"{rejecting}.act"] == "rejected"
    for name in BRANCHES:
        effects = [one for one in shop.effects(saga_id) if one.startswith(name)]
        assert effects == ([] if name == rejecting else [f"{name}.do", f"{name}.undo"])


def test_a_rejection_takes_back_the_steps_writes_and_publishes_the_abort_with_it(
    shop: Shop,
) -> None:
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    assert "users.do" not in shop.effects(saga_id)
    assert shop.steps(saga_id)["users.act"] == "rejected"
    published = shop.published(saga_id)
    assert (published["points.rejected"], published["saga.aborted"]) == (1, 1)
    (row,) = shop.rows(
        "SELECT reason FROM outbox.saga WHERE participant = 'users' AND saga_id = :id", id=saga_id
    )
    assert row.reason == "users.act: users says no"


def test_every_branch_may_reject_and_the_saga_is_aborted_once(shop: Shop) -> None:
    saga_id = shop.start(*BRANCHES)
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"
    assert shop.effects(saga_id) == ["order.do", "order.undo"]


def test_an_abort_that_comes_before_the_trigger_leaves_a_tombstone(shop: Shop) -> None:
    saga_id = shop.start("users")
    shop.deliver("order.created", "users")
    shop.deliver("saga.aborted", "inventory")
    assert shop.states(saga_id)["inventory"] == "compensated"
    shop.deliver("order.created", "inventory")
    assert shop.steps(saga_id)["inventory.act"] == "skipped"
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"
    assert "inventory.do" not in shop.effects(saga_id)
    assert "stock.reserved" not in shop.published(saga_id)


def test_an_abort_that_comes_after_the_step_has_it_compensated_as_work_of_its_own(
    eager: Shop,
) -> None:
    saga_id = eager.start("users")
    eager.deliver("order.created", "inventory")
    eager.deliver("order.created", "users")
    eager.deliver("saga.aborted", "inventory")
    assert eager.states(saga_id)["inventory"] == "compensating"
    assert eager.steps(saga_id)["inventory.act"] == "compensating"
    assert "inventory.undo" not in eager.effects(saga_id)
    (owed,) = (one for one in eager.play.collect() if one.handler)
    assert owed.handler == "inventory.act.compensation"
    eager.play.deliver(owed)
    assert eager.states(saga_id)["inventory"] == "compensated"
    assert eager.effects(saga_id) == ["order.do", "inventory.do", "inventory.undo"]


def test_aborts_that_come_twice_compensate_once(shop: Shop) -> None:
    saga_id = shop.start("users", "shipping")
    for branch in BRANCHES:
        shop.deliver("order.created", branch)
    assert shop.published(saga_id)["saga.aborted"] == 2
    shop.play.settle()
    for message in list(shop.play.delivered):
        shop.play.deliver(message)
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"


def test_duplicates_have_no_second_effect_even_when_the_inbox_has_forgotten_them(
    shop: Shop,
) -> None:
    completed, compensated = shop.start(), shop.start("shipping")
    shop.play.settle()
    before = shop.effects(completed), shop.effects(compensated), shop.published(completed)
    shop.run("DELETE FROM outbox.inbox")
    for message in [one for one in shop.play.delivered if one.handler is None]:
        is_own = decode(message.body).source == message.service
        outcome = str(shop.play.deliver(message))
        assert outcome == "" if is_own else "handled" in outcome
    shop.play.settle()
    assert check_whole(shop, completed) == "completed"
    assert check_whole(shop, compensated) == "compensated"
    assert before == (shop.effects(completed), shop.effects(compensated), shop.published(completed))


def test_a_late_success_of_an_aborted_saga_fires_no_join(shop: Shop) -> None:
    saga_id = shop.start("shipping")
    for branch in BRANCHES:
        shop.deliver("order.created", branch)
    shop.deliver("saga.aborted", "order")
    shop.deliver("stock.reserved", "order")
    shop.deliver("points.added", "order")
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"
    assert "order.confirm" not in shop.steps(saga_id)


def test_a_decided_saga_ignores_a_later_abort_and_says_so(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    saga_id = shop.start()
    shop.play.settle()
    other = shop.start("users")
    shop.deliver("order.created", "users")
    aborted = shop.message("saga.aborted", "order")
    forged = aborted.body.replace(str(other).encode(), str(saga_id).encode())
    with caplog.at_level(logging.WARNING, logger="saga"):
        shop.play.receivers["order"].receive(forged)
    assert shop.states(saga_id)["order"] == "completed"
    assert "the decision holds" in caplog.text


def test_a_completion_that_follows_an_abort_calls_for_a_person(eager: Shop) -> None:
    saga_id = eager.start()
    for branch in BRANCHES:
        eager.deliver("order.created", branch)
    for type in ("stock.reserved", "points.added", "shipment.created"):
        eager.deliver(type, "order")
    other = eager.start("users")
    eager.deliver("order.created", "users")
    body = eager.message("saga.aborted", "shipping").body
    eager.play.receivers["shipping"].receive(
        body.replace(str(other).encode(), str(saga_id).encode())
    )
    eager.play.settle()
    assert eager.states(saga_id)["shipping"] == "compensated stuck"
    assert eager.steps(saga_id)["shipping.saga.completed"] == "stuck"


def test_a_start_in_a_transaction_that_is_rolled_back_leaves_nothing(shop: Shop) -> None:
    with Session(shop.engine) as session:
        saga_id = shop.order.start(session, OrderCreated("o1"))
        session.rollback()
    assert shop.states(saga_id) == {}
    assert shop.published(saga_id) == {}


def test_a_start_writes_with_the_callers_transaction_through_whatever_publish_takes(
    shop: Shop,
) -> None:
    with shop.engine.begin() as connection:
        by_connection = shop.order.start(connection, OrderCreated("o1"))
    raw = shop.engine.raw_connection()
    by_driver = shop.order.start(raw.driver_connection, OrderCreated("o2"))
    raw.commit()
    raw.close()
    shop.play.settle()
    for saga_id in (by_connection, by_driver):
        assert set(shop.states(saga_id).values()) == {"completed"}


def test_the_same_command_twice_starts_one_saga(shop: Shop) -> None:
    saga_id = shop.start()
    with Session(shop.engine) as session, session.begin():
        with pytest.raises(AlreadyStarted) as refused:
            shop.order.start(session, OrderCreated("o1"), saga_id=saga_id)
        assert refused.value.saga_id == saga_id
        other = shop.order.start(session, OrderCreated("o2"))
    assert shop.published(saga_id)["order.created"] == 1
    assert shop.published(other)["order.created"] == 1


def test_every_event_of_a_saga_carries_its_id_and_what_caused_it(shop: Shop) -> None:
    saga_id = shop.start("shipping")
    shop.play.settle()
    envelopes = [one for one in shop.log() if str(saga_id).encode() in one.body]
    assert {one.extensions["sagaid"] for one in envelopes} == {str(saga_id)}
    assert {one.correlation_id for one in envelopes} == {str(saga_id)}
    (created,) = (one for one in envelopes if one.type == "order.created")
    assert created.causation_id is None
    for type in ("stock.reserved", "points.added", "shipment.rejected", "saga.aborted"):
        (envelope,) = (one for one in envelopes if one.type == type)
        assert envelope.causation_id == created.id
        assert envelope.source in (*BRANCHES,)


def test_each_participant_says_what_it_has_left_to_undo_until_nothing_is(shop: Shop) -> None:
    saga_id = shop.start("shipping")
    shop.deliver("order.created", "inventory")
    shop.deliver("order.created", "shipping")
    shop.play.settle()
    undone = [one.data for one in shop.log() if one.type == "saga.undone"]
    undone = [one for one in undone if one["saga_id"] == str(saga_id)]
    owed = {name: [] for name in ("order", *BRANCHES)}
    for one in undone:
        owed[one["participant"]].append([run["step"] for run in one["pending"]])
    assert owed == {
        "order": [["start:order.created"], []],
        "inventory": [["act"], []],
        "shipping": [[]],
        "users": [["act"], []],
    }
