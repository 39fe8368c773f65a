"""Ordered keys from the publisher to the handler, through real brokers, at the concurrency of a real worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outbox.buses import open_bus
from tests.relaying import relaying
from tests.steps import STEPS, Steps
from tests.workers import Billing

PROCESSES = 4
SOONER = {"BILLING_VISIBILITY": "1", "BILLING_MISSED_AFTER": "1"}


@pytest.fixture(autouse=True)
def _no_worker_is_left(billing: Billing) -> Iterator[None]:
    yield
    billing.kill_workers()


@pytest.mark.parametrize("batch", [(), ("--outbox-batch", "20")], ids=["alone", "in batches"])
def test_each_key_is_in_order_though_handlers_fail_and_a_worker_is_killed(
    billing: Billing, broker_url: str, batch: tuple[str, ...]
) -> None:
    """Of what the killed one had, some was lost on Redis, where it takes other tasks too, and comes again."""
    steps = Steps(billing.engine, billing.directory, f"order-{len(batch)}", seed=len(batch))
    options = ("--concurrency", str(PROCESSES), *batch)
    with relaying(billing.engine, open_bus(broker_url, f"{billing.name}.exchange")):
        doomed = billing.worker(*options, **SOONER)
        steps.publish(until=STEPS // 2)
        steps.until_one_hangs()
        doomed.kill()
        before = steps.processes()
        assert 0 < steps.count() < len(steps.keys) * STEPS // 2
        worker = billing.worker(*options, **SOONER)
        steps.publish(until=STEPS)
        steps.until_all_are_taken()
        billing.until_nothing_is_left()
    steps.assert_in_order()
    assert ("messages[" in doomed.log + worker.log) == bool(batch)
    assert len(steps.processes() - before) == PROCESSES, worker.log
