"""Schedules of the order example: the runtime as it is survives them, and with anything taken away it does not."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest

from examples.order_saga.simulated import simulation
from outbox.transactions import Transactions
from saga.testing.choices import Seeded
from saga.testing.simulation import Broken, Faults, Simulation, _Run
from saga.testing.world import Message, World
from tests.simulation.mutants import BATCH_MUTANTS, MUTANTS

SCHEDULES = int(os.environ.get("SIMULATION_SCHEDULES", "40"))
SEED = int(os.environ["SIMULATION_SEED"])
FOUND_WITHIN = 400


@pytest.fixture(scope="module")
def orders() -> Simulation:
    return simulation()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_schedule_of_fresh_seeds_leaves_every_order_whole(
    orders: Simulation, batch: int
) -> None:
    print(f"seeds from {SEED * 100}, batches of {batch} at most")
    report = replace(orders, batch=batch).run(SCHEDULES, SEED * 100)
    assert report.faults > SCHEDULES


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_runtime_with_one_thing_taken_away_is_found(orders: Simulation, mutant: object) -> None:
    with mutant():  # type: ignore[operator]
        assert orders.first_failure(FOUND_WITHIN) is not None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", BATCH_MUTANTS.values(), ids=BATCH_MUTANTS.keys())
def test_batches_with_one_thing_taken_away_are_found(orders: Simulation, mutant: object) -> None:
    with mutant():  # type: ignore[operator]
        assert replace(orders, batch=4).first_failure(FOUND_WITHIN) is not None


def test_batches_of_a_simulation_are_committed_as_batches(orders: Simulation) -> None:
    """What the model database does not understand would have them run one by one, unnoticed."""
    ended: Counter[str] = Counter()
    real = Transactions.once

    def once(self: Transactions, stage: Any) -> Any:
        name = "batch" if "Batch" in stage.__qualname__ else "single"
        try:
            result = real(self, stage)
        except Exception as error:
            ended[f"{name} {type(error).__name__}"] += 1
            raise
        ended[name] += 1
        return result

    with patch.object(Transactions, "once", once):
        replace(orders, batch=4, faults=Faults(0, 0, 0, 0, 0)).run(3)
    assert ended["batch"] > 10
    assert [name for name in ended if name.startswith("batch ")] == []


def test_a_service_is_out_for_the_whole_unwinding_of_some_orders(orders: Simulation) -> None:
    undone_without: set[str] = set()

    def note(world: World) -> None:
        for line, later in pairwise(world.trace):
            if line.startswith("-- ") and line.endswith(" is back") and "saga.aborted" in later:
                undone_without.add(line)

    out = replace(orders, faults=Faults(0, 0, 0, 2, 0), invariants=[*orders.invariants, note])
    out.run(30)
    assert undone_without


def test_what_breaks_is_shown_with_its_seed_and_a_short_schedule_that_replays(
    orders: Simulation,
) -> None:
    with MUTANTS["early_ack"]():
        with pytest.raises(Broken) as caught:
            orders.run(FOUND_WITHIN)
        broken = caught.value
        assert f"seed {broken.seed}" in str(broken)
        assert "kill" in str(broken)
        with pytest.raises(AssertionError):
            orders.replay(broken.decisions)
    orders.replay(broken.decisions)


def test_a_killed_worker_gives_back_its_own_copy_of_a_message_and_nobody_elses(
    orders: Simulation,
) -> None:
    run = _Run(orders, Seeded(0))
    message = Message("saga.aborted", UUID(int=1), b"{}")
    for name in ("users", "shipping"):
        run.world[name].queue.append(message)
        run._taker(run.world[name], 0)()
    of_shipping = run.world.hub.processes[-1]
    assert of_shipping.service == "shipping"
    run._give_back(of_shipping)
    assert run.world["shipping"].queue == [message.again()]
    assert run.world["users"].queue == []
    run.world.hub.processes.clear()
