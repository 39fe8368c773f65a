"""Workers that handle several events in one transaction, and what may not follow from that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from outbox.celery.task import BATCH_TASK_NAME
from tests.workers import Billing, Worker, eventually

BATCH = ("--outbox-batch", "20")


@pytest.fixture(autouse=True)
def _no_worker_is_left(billing: Billing) -> Iterator[None]:
    yield
    billing.kill_workers()


def batched(billing: Billing, *options: str, **environment: str) -> Worker:
    """On Redis only a worker that consumes nothing else can be killed without a loss."""
    environment.setdefault("BILLING_EVENTS_ONLY", "yes")
    return billing.worker("--concurrency", "1", *options, *BATCH, **environment)


def in_transactions(billing: Billing, orders: list[str]) -> int:
    rows = billing.rows(
        "SELECT count(DISTINCT xmin::text) AS count FROM effect WHERE what = ANY(:orders)",
        orders=orders,
    )
    return int(rows[0].count)


def test_events_that_have_piled_up_are_handled_together(billing: Billing) -> None:
    orders = [f"piled-{number:02}" for number in range(40)]
    for order in orders:
        billing.send(billing.placed(order))

    worker = batched(billing)

    eventually(lambda: billing.effects_of(*orders) == orders, explain=lambda: worker.log)
    assert in_transactions(billing, orders) <= 10
    assert "messages[" in worker.log, "it says how many it has received"
    billing.until_nothing_is_left()


def test_a_single_event_is_handled_as_without_batches(billing: Billing) -> None:
    worker = batched(billing)

    billing.send(billing.placed("single"))

    eventually(lambda: billing.effects_of("single"), explain=lambda: worker.log)
    assert worker.task_id("order.placed") is not None


def test_a_failing_event_of_a_batch_is_retried_and_parked_and_hurts_no_other(
    billing: Billing,
) -> None:
    orders = [f"beside-{number}" for number in range(8)]
    for order in orders:
        billing.send(billing.placed(order))
    billing.send(billing.placed("wrong", do="fail"))

    worker = batched(billing)

    dead = "SELECT 1 FROM outbox.dead_letter WHERE key = 'wrong'"
    eventually(lambda: billing.rows(dead), 40, lambda: worker.log)
    assert billing.effects_of(*orders, "wrong") == orders
    billing.until_nothing_is_left()


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_an_event_that_kills_its_process_takes_no_other_of_its_batch_with_it(
    billing: Billing, pool: str
) -> None:
    orders = [f"{pool}-{number}" for number in range(8)]
    for order in orders[:4]:
        billing.send(billing.placed(order))
    poison = f"{pool}-poison"
    billing.send(billing.placed(poison, do="kill"))
    for order in orders[4:]:
        billing.send(billing.placed(order))

    def worker() -> Worker:
        return batched(billing, "--pool", pool, BILLING_VISIBILITY="1")

    running = worker()
    dead = "SELECT 1 FROM outbox.dead_letter WHERE key = :poison"

    def is_parked() -> bool:
        nonlocal running
        if not running.is_alive:
            running = worker()
        return bool(billing.rows(dead, poison=poison))

    eventually(is_parked, 60, lambda: running.log)
    eventually(lambda: billing.effects_of(*orders) == orders, 20, lambda: running.log)
    billing.until_nothing_is_left()
    assert billing.effects_of(*orders, poison) == orders


@pytest.mark.parametrize(
    "point",
    [
        "receive.batch_begun",
        "receive.batch_handled",
        "receive.batch_committed",
        "receive.before_ack",
    ],
)
def test_a_worker_killed_in_a_batch_loses_nothing_and_repeats_nothing(
    billing: Billing, point: str
) -> None:
    """In one process (solo), so that the kill takes the broker's connection with it."""
    orders = [f"{point}-{number}" for number in range(6)]
    for order in orders:
        billing.send(billing.placed(order))
    solo = ("--pool", "solo")
    doomed = batched(billing, *solo, OUTBOX_CRASH_AT=point, BILLING_VISIBILITY="1")
    eventually(lambda: not doomed.is_alive, 20, lambda: doomed.log)

    next_worker = batched(billing, *solo, BILLING_VISIBILITY="1")

    eventually(lambda: billing.effects_of(*orders) == orders, 20, lambda: next_worker.log)
    billing.until_nothing_is_left()
    assert billing.effects_of(*orders) == orders


def test_a_warm_shutdown_gives_back_what_was_not_begun(billing: Billing) -> None:
    orders = [f"warm-{number:02}" for number in range(45)]
    for order in orders:
        billing.send(billing.placed(order, do="sleep 0.05"))
    first = batched(billing)
    billing.until_a_handler_is_at_work(first)

    assert first.terminate() == 0
    done = billing.effects_of(*orders)
    assert len(done) < len(orders)
    second = batched(billing)
    eventually(lambda: billing.effects_of(*orders) == orders, 20, lambda: second.log)
    billing.until_nothing_is_left()


def test_garbage_between_the_events_is_quarantined_and_they_are_handled(
    billing: Billing, broker_url: str
) -> None:
    orders = [f"clean-{number:02}" for number in range(20)]
    for order in orders[:10]:
        billing.send(billing.placed(order))
    billing.publish(b"garbage", headers={"task": "outbox.receive"})
    if broker_url.startswith("redis"):
        with redis.Redis.from_url(broker_url) as client:
            client.lpush(billing.queue, b"no message of kombu's")
    else:
        billing.publish(b"no message of ours", headers={"task": "somebody.elses"})
    for order in orders[10:]:
        billing.send(billing.placed(order))

    worker = batched(billing)

    eventually(lambda: billing.effects_of(*orders) == orders, explain=lambda: worker.log)
    kept = "SELECT 1 FROM outbox.quarantine WHERE body LIKE 'garbage%' OR body LIKE 'no message%'"
    eventually(lambda: len(billing.rows(kept)) == 2, explain=lambda: worker.log)
    billing.until_nothing_is_left()


def test_a_worker_that_has_other_queues_handles_batches_too(billing: Billing) -> None:
    orders = [f"beside-tasks-{number:02}" for number in range(40)]
    for order in orders:
        billing.send(billing.placed(order))

    worker = batched(billing, BILLING_EVENTS_ONLY="")

    eventually(lambda: billing.effects_of(*orders) == orders, explain=lambda: worker.log)
    assert in_transactions(billing, orders) <= 10
    billing.until_nothing_is_left()


def test_a_worker_takes_no_more_than_its_prefetch(billing: Billing) -> None:
    """Two batches for its one process; the others are left for other workers."""
    orders = [f"slow-{number:03}" for number in range(100)]
    for order in orders:
        billing.send(billing.placed(order, do="sleep 0.03"))
    worker = batched(billing)
    eventually(lambda: "messages[" in worker.log, explain=lambda: worker.log)

    eventually(lambda: billing.queued() <= 60, explain=lambda: worker.log)
    assert billing.queued() >= 40
    billing.until_nothing_is_left()


def test_nobody_can_send_a_batch(billing: Billing) -> None:
    worker = batched(billing)

    billing.publish(b"[[[]], {}, {}]", headers={"task": BATCH_TASK_NAME, "id": "x"})

    kept = "SELECT 1 FROM outbox.quarantine WHERE reason LIKE '%receive_batch%'"
    eventually(lambda: billing.rows(kept), explain=lambda: worker.log)
