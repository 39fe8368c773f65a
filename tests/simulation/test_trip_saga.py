"""Schedules of the trip example: a chain, an any-of join, a pivot and a deadline, whatever comes between."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from examples.trip_saga.simulated import simulation
from saga.testing.simulation import Simulation
from saga.testing.world import World
from tests.simulation.mutants import TRIP_BATCH_MUTANTS, TRIP_MUTANTS
from tests.simulation.test_order_saga import FOUND_WITHIN, SCHEDULES, SEED

SAID = ("trip.booked", "trip.timed_out", "trip.not_paid", "trip.nobody_goes", "hotel.no_room")


@pytest.fixture(scope="module")
def trips() -> Simulation:
    return simulation()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_schedule_of_fresh_seeds_leaves_every_trip_whole(
    trips: Simulation, batch: int
) -> None:
    print(f"seeds from {SEED * 100}, batches of {batch} at most")
    report = replace(trips, batch=batch).run(SCHEDULES, SEED * 100)
    assert report.faults > SCHEDULES


def test_the_schedules_see_every_end(trips: Simulation) -> None:
    ends: Counter[str] = Counter()

    def note(world: World) -> None:
        for node in world.nodes.values():
            ends.update(row["type"] for row in node.rows("outbox_event"))

    replace(trips, invariants=[*trips.invariants, note]).run(40)
    assert all(ends[one] for one in SAID), ends


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", TRIP_MUTANTS.values(), ids=TRIP_MUTANTS.keys())
def test_a_runtime_with_one_thing_taken_away_is_found(trips: Simulation, mutant: object) -> None:
    with mutant():  # type: ignore[operator]
        assert trips.first_failure(FOUND_WITHIN) is not None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", TRIP_BATCH_MUTANTS.values(), ids=TRIP_BATCH_MUTANTS.keys())
def test_batches_with_one_thing_taken_away_are_found(trips: Simulation, mutant: object) -> None:
    with mutant():  # type: ignore[operator]
        assert replace(trips, batch=4).first_failure(FOUND_WITHIN) is not None
