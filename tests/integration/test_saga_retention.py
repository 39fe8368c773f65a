"""Sagas that ended long ago are forgotten; open, stuck and recent ones, and what may come back, are not."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, text

from outbox.celery.engines import ForkSafeEngine
from outbox.celery.sweeping import _keep_up
from saga.retention import forget_ended, no_shorter_than
from tests.sagas import Shop, check_whole

DAYS_90 = timedelta(days=90)


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@pytest.fixture
def shop(engine: Engine) -> Shop:
    shop = Shop(engine, unwind="eager")
    for table in ("saga", "dead_letter", "pending_delivery", "quarantine"):
        shop.run(f"DELETE FROM outbox.{table}")
    return shop


def completed(shop: Shop) -> UUID:
    saga_id = shop.start()
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"
    return saga_id


def compensated(shop: Shop) -> UUID:
    saga_id = shop.start("users")
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"
    return saga_id


def let_pass(shop: Shop, days: int) -> None:
    for table in ("saga", "saga_step"):
        shop.run(
            f"UPDATE outbox.{table} SET changed_at = changed_at - :age", age=timedelta(days=days)
        )


def forget(shop: Shop, *, at_once: int = 1_000) -> int:
    return sum(
        forget_ended(shop.engine, one.name, DAYS_90, at_once=at_once) for one in shop.participants
    )


def test_ended_sagas_are_forgotten_with_all_that_belongs_to_them_and_in_small_batches(
    shop: Shop,
) -> None:
    ids = [completed(shop), compensated(shop), completed(shop)]
    shop.run(
        "INSERT INTO outbox.saga_intervention (saga_id, participant, verb, operator, reason) "
        "VALUES (:id, 'order', 'resume', 'ana', 'x')",
        id=ids[0],
    )
    let_pass(shop, 91)
    assert forget(shop, at_once=2) == 12
    for table in ("saga", "saga_step", "saga_join_arrival", "saga_intervention"):
        assert shop.rows(f"SELECT * FROM outbox.{table}") == []


def test_a_recent_end_is_remembered(shop: Shop) -> None:
    completed(shop)
    let_pass(shop, 89)
    assert forget(shop) == 0


def test_an_open_saga_is_never_forgotten(shop: Shop) -> None:
    running = shop.start()
    undoing = shop.start("users")
    for saga_id in (running, undoing):
        assert shop.states(saga_id)["order"] == "running"
    shop.deliver("order.created", "inventory")
    let_pass(shop, 10_000)
    assert forget(shop) == 0


def test_a_stuck_saga_is_never_forgotten(shop: Shop) -> None:
    shop.failures["inventory.undo"] = 2
    saga_id = shop.start("shipping")
    for branch in ("inventory", "users", "shipping"):
        shop.deliver("order.created", branch)
    shop.play.settle()
    shop.run("DELETE FROM outbox.dead_letter")
    let_pass(shop, 10_000)
    forget(shop)
    assert shop.states(saga_id) == {"inventory": "compensating stuck"}


def test_a_decided_saga_that_still_had_a_run_lately_is_remembered(shop: Shop) -> None:
    saga_id = completed(shop)
    let_pass(shop, 91)
    shop.run(
        "UPDATE outbox.saga_step SET changed_at = clock_timestamp() WHERE participant = 'users'"
    )
    assert forget(shop) == 3
    assert shop.states(saga_id) == {"users": "completed"}


@pytest.mark.parametrize("kept_in", ["dead_letter", "pending_delivery", "quarantine"])
def test_what_may_be_run_again_at_any_age_keeps_its_tombstone(shop: Shop, kept_in: str) -> None:
    saga_id = shop.start("users")
    trigger = shop.message("order.created", "inventory")
    shop.play.waiting.remove(trigger)
    shop.play.settle()
    shop.run(
        {
            "dead_letter": "INSERT INTO outbox.dead_letter "
            "(service, handler, event_id, type, body, attempts, error, traceback) "
            "VALUES ('inventory', 'inventory.act', :id, 'order.created', :body, 8, 'x', 'x')",
            "pending_delivery": "INSERT INTO outbox.pending_delivery "
            "(service, handler, event_id, type, body, reason, next_attempt_at) "
            "VALUES ('inventory', 'inventory.act', :id, 'order.created', :body, 'retry', now())",
            "quarantine": "INSERT INTO outbox.quarantine (service, digest, reason, headers, body) "
            "VALUES ('inventory', sha256(:body), 'x', '', :body || '\\xff')",
        }[kept_in],
        id=trigger.event_id,
        body=trigger.body,
    )
    let_pass(shop, 91)
    assert forget(shop) == 0
    assert shop.states(saga_id)["inventory"] == "compensated"


def test_a_saga_that_somebody_works_on_is_left_for_the_next_time(shop: Shop) -> None:
    completed(shop)
    let_pass(shop, 91)
    with shop.engine.begin() as worker:
        worker.execute(text("SELECT 1 FROM outbox.saga WHERE participant = 'users' FOR UPDATE"))
        assert forget(shop) == 3
    assert forget(shop) == 1


def test_a_participant_forgets_as_part_of_a_workers_chores(shop: Shop) -> None:
    completed(shop)
    let_pass(shop, 91)
    for participant in shop.participants:
        _keep_up(ForkSafeEngine(shop.engine, name="chores"), participant, timedelta(days=30))
    assert shop.rows("SELECT * FROM outbox.saga") == []


def test_a_tombstone_outlives_the_dedupe_window_whatever_the_retention() -> None:
    assert no_shorter_than(timedelta(days=30), timedelta(days=1)) == timedelta(days=31)
    assert no_shorter_than(timedelta(days=30), DAYS_90) == DAYS_90
