"""Schedules of a saga with everything in it, undone in either way, and with both ways side by side."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from saga.check import check
from saga.contract import contract_of
from saga.participant import Unwinding
from saga.testing.world import World
from tests.simulation.shapes import Shapes
from tests.simulation.test_order_saga import SCHEDULES, SEED

UNWINDING: dict[str, tuple[Unwinding, ...]] = {
    "in reverse": ("reverse",),
    "at once": ("eager",),
    "some at once": ("eager", "reverse"),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("unwind", UNWINDING.values(), ids=UNWINDING.keys())
def test_every_schedule_leaves_every_saga_whole(unwind: tuple[Unwinding, ...], batch: int) -> None:
    report = Shapes(unwind).simulation(batch).run(max(SCHEDULES // 4, 1), SEED * 100)
    assert report.faults > report.schedules


def test_the_schedules_see_every_end_and_a_person_at_work() -> None:
    simulated = Shapes().simulation()
    seen: Counter[str] = Counter()

    def note(world: World) -> None:
        seen["person"] += any("a person" in line for line in world.trace)
        seen.update(row["state"] for row in world["desk"].rows("saga"))
        for node in world.nodes.values():
            seen.update(row["type"] for row in node.rows("outbox_event"))

    replace(simulated, invariants=[*simulated.invariants, note]).run(20)
    expected = (
        "person",
        "completed",
        "compensated",
        "shape.finished",
        "shape.noleg",
        "shape.toolate",
    )
    assert all(seen[one] for one in expected), seen


def test_the_check_has_nothing_against_it() -> None:
    assert check([contract_of(one) for one in Shapes().participants.values()]) == []
