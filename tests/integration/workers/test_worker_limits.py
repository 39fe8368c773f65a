"""Shutdowns, revocations and time limits: whatever ends a handler early, the event is not lost.

Celery's own doing, so on one broker only.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.servers import Room, Unavailable
from tests.workers import Billing, eventually


@pytest.fixture(scope="module")
def broker_url(room: Room) -> str:
    try:
        return room.url("rabbitmq")
    except Unavailable as unavailable:
        pytest.skip(f"no server: {unavailable}")


@pytest.fixture(autouse=True)
def _no_worker_is_left(billing: Billing) -> Iterator[None]:
    yield
    billing.kill_workers()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_warm_shutdown_finishes_what_runs_and_gives_back_the_rest(
    billing: Billing, pool: str
) -> None:
    orders = [f"{pool}-{number}" for number in range(8)]
    first = billing.worker("--pool", pool, "--concurrency", "2")
    for order in orders:
        billing.send(billing.placed(order, do="sleep 1"))
    billing.until_a_handler_is_at_work(first)

    assert first.terminate() == 0
    assert 0 < len(billing.effects_of(*orders)) < len(orders)
    second = billing.worker("--pool", pool, "--concurrency", "2")
    eventually(lambda: billing.effects_of(*orders) == orders, explain=lambda: second.log)


def test_a_warm_shutdown_hears_from_a_process_that_was_just_given_an_event(
    billing: Billing,
) -> None:
    worker = billing.worker("--concurrency", "1", "--prefetch-multiplier", "2")
    (process,) = worker.processes()
    process.suspend()
    billing.send(billing.placed("just-given"))
    eventually(lambda: "received" in worker.log, explain=lambda: worker.log)
    worker.process.send_signal(signal.SIGTERM)
    eventually(lambda: "Warm shutdown" in worker.log, explain=lambda: worker.log)
    billing.send(billing.placed("not-given"))  # wakes it up
    eventually(lambda: worker.log.count("received") == 2, explain=lambda: worker.log)
    time.sleep(1)  # its consumer closes, which nothing says
    process.resume()
    eventually(lambda: not worker.is_alive, 20, lambda: worker.log)
    assert billing.effects_of("just-given", "not-given") == ["just-given"]
    assert billing.queued() == 1


@pytest.mark.parametrize("point", ["receive.begun", "receive.before_ack"])
def test_a_process_of_the_pool_that_is_killed_is_replaced(billing: Billing, point: str) -> None:
    worker = billing.worker("--concurrency", "1", OUTBOX_CRASH_AT=f"{point}:2")
    orders = [f"{point}-{number}" for number in range(2)]
    for order in orders:
        billing.send(billing.placed(order))

    eventually(lambda: billing.effects_of(*orders) == orders, 30, lambda: worker.log)
    eventually(lambda: "signal 9 (SIGKILL)" in worker.log, explain=lambda: worker.log)
    billing.until_nothing_is_left()
    assert billing.effects_of(*orders) == orders


def test_a_cold_shutdown_in_a_handler_repeats_nothing(billing: Billing) -> None:
    first = billing.worker("--concurrency", "1")
    billing.send(billing.placed("cold", do="sleep 3"))
    eventually(lambda: "order.placed[" in first.log, explain=lambda: first.log)
    first.process.send_signal(signal.SIGQUIT)
    first.process.wait(20)
    assert billing.effects_of("cold") == []

    second = billing.worker("--concurrency", "1")
    eventually(lambda: billing.effects_of("cold"), 30, lambda: second.log)
    billing.until_nothing_is_left()
    assert billing.effects_of("cold") == ["cold"]


def test_revoking_and_terminating_an_event_gives_it_back(billing: Billing) -> None:
    worker = billing.worker("--concurrency", "1")
    envelope = billing.placed("revoked", do="sleep 2")
    billing.send(envelope)
    task_id = eventually(lambda: worker.task_id("order.placed"), explain=lambda: worker.log)

    billing.control.revoke(task_id, terminate=True, signal="SIGKILL")

    eventually(lambda: billing.effects_of("revoked"), 30, lambda: worker.log)
    billing.until_nothing_is_left()
    assert billing.effects_of("revoked") == ["revoked"]


def test_a_hard_time_limit_is_counted_and_the_event_parked(billing: Billing) -> None:
    worker = billing.worker("--concurrency", "1", "--time-limit", "0.5")
    billing.send(billing.placed("endless", do="sleep 60"))

    dead = "SELECT 1 FROM outbox.dead_letter WHERE key = 'endless'"
    eventually(lambda: billing.rows(dead), 40, lambda: worker.log)
    billing.until_nothing_is_left()
    assert billing.effects_of("endless") == []


def test_a_soft_time_limit_is_a_failure_like_any_other(billing: Billing) -> None:
    worker = billing.worker("--concurrency", "1", "--soft-time-limit", "0.5")
    billing.send(billing.placed("too slow", do="sleep 60"))

    dead = "SELECT error FROM outbox.dead_letter WHERE key = 'too slow'"
    eventually(lambda: billing.rows(dead), 40, lambda: worker.log)
    assert "SoftTimeLimitExceeded" in billing.rows(dead)[0].error


def test_threads_share_a_worker(billing: Billing) -> None:
    worker = billing.worker("--pool", "threads", "--concurrency", "4")
    orders = sorted(f"thread-{number}" for number in range(20))
    for order in orders:
        billing.send(billing.placed(order))

    eventually(lambda: billing.effects_of(*orders) == orders, explain=lambda: worker.log)


@pytest.mark.parametrize("batch", [(), ("--outbox-batch", "10")], ids=["one by one", "batches"])
def test_a_worker_without_processes_of_its_own_does_not_pause(
    billing: Billing, batch: tuple[str, ...]
) -> None:
    """It would for seconds, again and again, over acknowledgements that its loop leaves lying."""
    worker = billing.worker("--pool", "solo", *batch)
    orders = sorted(f"solo-{len(batch)}-{number}" for number in range(200))
    for order in orders:
        billing.send(billing.placed(order))

    eventually(lambda: billing.effects_of(*orders) == orders, explain=lambda: worker.log)
    worker.kill()
