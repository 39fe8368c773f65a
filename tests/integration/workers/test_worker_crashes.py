"""Workers that are killed or cut off at the worst moment: one effect, nothing lost."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from sqlalchemy import make_url

from tests.databases import Databases
from tests.local_servers import LocalPostgres
from tests.workers import Billing, eventually


@pytest.fixture(autouse=True)
def _no_worker_is_left(billing: Billing) -> Iterator[None]:
    yield
    billing.kill_workers()


@pytest.mark.parametrize(
    ("point", "has_effect"),
    [
        ("receive.handled", False),
        ("receive.committed", True),
    ],
)
def test_a_worker_killed_on_the_way_loses_nothing_and_repeats_nothing(
    billing: Billing, point: str, has_effect: bool
) -> None:
    """In one process (solo), so that the kill takes the broker's connection with it."""
    order = f"killed-at-{point}"
    doomed = billing.worker("--pool", "solo", OUTBOX_CRASH_AT=point, BILLING_VISIBILITY="1")
    billing.send(billing.placed(order))
    assert doomed.process.wait(20) == -signal.SIGKILL
    assert billing.effects_of(order) == ([order] if has_effect else [])

    next_worker = billing.worker("--pool", "solo", BILLING_VISIBILITY="1")
    eventually(lambda: billing.effects_of(order), 20, lambda: next_worker.log)
    billing.until_nothing_is_left()
    assert billing.effects_of(order) == [order]


@pytest.mark.parametrize("batch", [(), ("--outbox-batch", "20")], ids=["alone", "in batches"])
def test_workers_killed_again_and_again_lose_nothing(
    billing: Billing, batch: tuple[str, ...]
) -> None:
    """Whole workers, whatever they have in hand, in their sockets and under way to them."""
    chance = random.Random(7)
    orders = [f"again-{len(batch)}-{number:03}" for number in range(240)]
    options = ("--concurrency", "2", *batch)
    settings = {"BILLING_EVENTS_ONLY": "yes", "BILLING_VISIBILITY": "1"}
    for at in range(0, len(orders), 60):
        doomed = billing.worker(*options, **settings)
        for order in orders[at : at + 60]:
            billing.send(billing.placed(order, do="sleep 0.005"))
        enough = at + chance.randint(1, 50)
        eventually(partial(_has_effects, billing, orders, enough))
        doomed.kill()

    last = billing.worker(*options, **settings)
    eventually(lambda: billing.effects_of(*orders) == orders, 30, lambda: last.log)
    billing.until_nothing_is_left()
    assert billing.effects_of(*orders) == orders


def _has_effects(billing: Billing, orders: list[str], count: int) -> bool:
    return len(billing.effects_of(*orders)) >= count


# ---- the database goes away ----


def test_events_wait_for_a_database_that_is_away(
    broker_url: str, private_postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory
) -> None:
    databases = Databases(private_postgres.url, _RoomOf(tmp_path_factory))
    url = make_url(databases.create_migrated()).render_as_string(hide_password=False)
    billing = Billing(url, broker_url, tmp_path_factory.mktemp("away"))
    try:
        worker = billing.worker(BILLING_PATIENCE="0.5")
        billing.send(billing.placed("before"))
        eventually(lambda: billing.effects_of("before"), explain=lambda: worker.log)
        billing.engine.dispose()
        databases.close()
        private_postgres.kill()

        billing.send(billing.placed("meanwhile"))
        billing.publish(b"garbage", headers={"task": "outbox.receive"})
        eventually(lambda: worker.log.count("given back") >= 2, 20, lambda: worker.log)
        private_postgres.start()

        eventually(lambda: billing.effects_of("meanwhile"), 30, lambda: worker.log)
        eventually(lambda: billing.rows("SELECT 1 FROM outbox.quarantine"), 30, lambda: worker.log)
        assert billing.rows("SELECT 1 FROM outbox.dead_letter") == []
    finally:
        billing.close()


class _RoomOf:
    """As much of a room as making one template needs."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.path = factory.mktemp("room")

    def once(self, _: str, make: object) -> str:
        assert callable(make)
        made: str = make()
        return made
