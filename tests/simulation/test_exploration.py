"""Every course of one saga is followed, not a sample of them; what breaks is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random
from uuid import UUID

import pytest
from sqlalchemy.orm import Session

from examples.order_saga.simulated import one_order
from outbox.events import Registry
from saga import Participant, Reject
from saga.testing.exploration import (
    Budget,
    Counterexample,
    Exploration,
    explore,
    fingerprint,
)
from saga.testing.naming import Naming
from saga.testing.simulation import Request, Simulation
from saga.testing.world import SimulatedService, World
from tests.simulation.mutants import MUTANTS

FINE = 0
NO_FAULTS = Budget(0, 0)
EVERYWHERE = Budget(None, None)
"""Each message comes twice, and each of its deliveries is cut off once, or not."""


@dataclass(frozen=True)
class Fact:
    is_refused: bool


class Opened(Fact): ...


class Done(Fact): ...


class Refused(Fact): ...


def refusal(*, is_refused: bool) -> Simulation:
    """Two participants: one opens and completes, the other does or refuses."""
    registry = Registry()
    for cls in (Opened, Done, Refused):
        registry.event(f"small.{cls.__name__.lower()}", key="is_refused")(cls)
    desk, worker = (Participant(name, registry=registry) for name in ("desk", "worker"))
    desk.starts(Opened).compensation(lambda opened, session: None)
    desk.join(Done, completes=True, name="end")(lambda done, session: None)

    @worker.step(on=Opened, emits=Done, rejects=Refused)
    def work(opened: Opened, session: Session) -> Done:
        if opened.is_refused:
            raise Reject(Refused(True))
        return Done(False)

    work.compensation(lambda opened, done, session: None)
    open_it = partial(desk.start, event=Opened(is_refused), saga_id=UUID(int=1))
    return Simulation(
        services=[SimulatedService(desk), SimulatedService(worker)],
        requests=[Request("desk", lambda session: open_it(session), "opens")],
    )


def said(explored: Exploration) -> str:
    return (
        f"{explored.states} distinct states, {len(explored.ends)} ends, {explored.actions} actions, "
        f"{explored.handled} runs of the services' code"
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "budget", [Budget(1, 0), Budget(0, 1), Budget(1, 1)], ids=["a duplicate", "a crash", "both"]
)
def test_every_course_of_an_order_ends_whole(budget: Budget) -> None:
    explored = explore(one_order(FINE), budget)
    print(said(explored))
    assert explored.states > 500


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("is_refused", "budget"),
    [(False, EVERYWHERE), (True, Budget(0, None)), (True, Budget(1, 1))],
    ids=["completed, faults everywhere", "refused, cut off everywhere", "refused, one of each"],
)
def test_every_course_of_a_small_saga_ends_whole(is_refused: bool, budget: Budget) -> None:
    explored = explore(refusal(is_refused=is_refused), budget)
    print(said(explored))
    assert explored.states > 500


def test_a_course_that_breaks_an_invariant_is_drawn() -> None:
    with MUTANTS["inbox_in_its_own_transaction"](), pytest.raises(Counterexample) as caught:
        explore(one_order(FINE), Budget(0, 1))
    assert caught.value.diagram.startswith("sequenceDiagram\n  client->>order: ")
    assert "-x" in caught.value.diagram


def test_a_choreography_that_is_not_small_is_said_to_be_so() -> None:
    with pytest.raises(RuntimeError, match="more than 50 worlds"):
        explore(one_order(FINE), NO_FAULTS, max_states=50)


@pytest.mark.parametrize("is_refused", [False, True], ids=["completed", "refused"])
def test_every_course_of_whole_databases_ends_in_a_world_that_was_explored(
    is_refused: bool,
) -> None:
    """Without the shortcut that a service's code runs once: it must change nothing."""
    simulated = refusal(is_refused=is_refused)
    explored = explore(simulated, NO_FAULTS)
    ends = {course(simulated, Random(seed)) for seed in range(40)}
    assert ends <= explored.ends


def course(simulation: Simulation, random: Random) -> bytes:
    """One course taken at random, all services' databases at once; relays and sweepers send when it pleases them."""
    naming = Naming()
    world = World(simulation.services)
    with naming.applied():
        for request in simulation.requests:
            node = world[request.service]
            naming.begin(f"{node.name} request 0", world.now)
            with Session(node.engine) as session, session.begin():
                request.run(session)
        while True:
            moves = []
            for node in world.nodes.values():
                moves += [(node, message) for message in node.queue]
                due = node.next_due()
                moves += [(node, "relay")] if node.unsent() else []
                moves += [(node, "sweep")] if due is not None and due <= world.now else []
            if not moves:
                return fingerprint(world)
            node, what = random.choice(moves)
            if isinstance(what, str):
                getattr(node, what)()
                continue
            node.queue.remove(what)
            world.in_hand.append((node, what))
            naming.begin(f"{node.name} {what.event_id} {what.handler}", world.now)
            node.receive(what)
