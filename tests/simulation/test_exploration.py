"""Every course of one order is followed, not a sample of them; what breaks is drawn."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from examples.order_saga.simulated import one_order
from saga.testing.exploration import Budget, Counterexample, explore
from tests.simulation.mutants import MUTANTS


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


FINE = 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "budget", [Budget(0, 1, 0), Budget(0, 0, 1)], ids=["a reordering", "a crash"]
)
def test_every_course_of_an_order_ends_whole(budget: Budget) -> None:
    explored = explore(one_order(FINE), budget)
    print(f"{explored.states} distinct states, {explored.actions} actions, {explored.courses} ends")
    assert explored.states > 100


def test_a_course_that_breaks_an_invariant_is_drawn() -> None:
    with MUTANTS["inbox_in_its_own_transaction"](), pytest.raises(Counterexample) as caught:
        explore(one_order(FINE), Budget(0, 0, 1))
    assert caught.value.diagram.startswith("sequenceDiagram\n  client->>order: ")
    assert "-x" in caught.value.diagram


def test_a_choreography_that_is_not_small_is_said_to_be_so() -> None:
    with pytest.raises(RuntimeError, match="more than 50 worlds"):
        explore(one_order(FINE), Budget(0, 0, 0), max_states=50)
