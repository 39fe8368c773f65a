"""`explore`: every course that a small choreography can take, within a few faults, instead of a sample of them.

A course is a sequence of whole actions: a service handles one message, a relay sends, a sweeper sends. Between two of
them the world is at rest, so it can be copied, and two courses that lead to the same world need be followed only once.
Within the budget, any message may come out of turn, come twice, or be handled by a worker that dies before its commit,
in it, or before its ack. What is found is drawn as a sequence diagram.

Ids differ from one course to another, so worlds are compared under names that say what an event is: its type, its
source and what caused it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.envelope import decode
from saga.testing.processes import Process
from saga.testing.simulation import Simulation, settled
from saga.testing.world import Message, World

_CRASHES: Final = ("commit", "committed", "before ack")
_VOLATILE: Final = frozenset(
    {
        "ordinal",
        "position",
        "xid",
        "id",
        "sends",
        "body",
        "trigger",
        "emitted",
        "published",
        "digest",
        "traceback",
    }
)


@dataclass(frozen=True)
class Budget:
    """How many of each fault a course may have."""

    duplicates: int = 1
    reorders: int = 1
    crashes: int = 1

    def without(self, fault: str) -> Budget:
        return replace(self, **{fault: getattr(self, fault) - 1})


@dataclass(frozen=True)
class Exploration:
    """What was explored."""

    states: int
    """Distinct worlds that were reached."""
    courses: int
    """Distinct worlds in which nothing moved any more."""
    actions: int


class Counterexample(AssertionError):
    """A course that breaks an invariant; `diagram` draws it (Mermaid)."""

    def __init__(self, error: BaseException, steps: Sequence[Step]) -> None:
        self.error, self.steps = error, list(steps)
        self.diagram = sequence_diagram(self.steps)
        lines = "\n".join(f"  {number:3} {step.text}" for number, step in enumerate(self.steps, 1))
        super().__init__(f"{type(error).__name__}: {error}\n\nafter\n{lines}\n\n{self.diagram}")


@dataclass(frozen=True)
class Step:
    """One action of a course, for people."""

    text: str
    source: str
    target: str
    label: str


@dataclass
class _State:
    world: World
    budget: Budget
    steps: list[Step] = field(default_factory=list)
    asked: int = 0


def explore(
    simulation: Simulation, budget: Budget | None = None, *, max_states: int = 200_000
) -> Exploration:
    """Follow every course of *simulation* within *budget*. Raises `Counterexample` for one that breaks an invariant.

    Raises `RuntimeError` where there are more than *max_states* worlds: the choreography is not small.
    """
    start = _State(World(simulation.services), budget or Budget())
    todo = deque([start])
    seen = {_fingerprint(start)}
    courses = actions = 0
    while todo:
        state = todo.popleft()
        moves = list(_moves(simulation, state))
        if not moves:
            courses += 1
            _judge(simulation, state)
        for move in moves:
            following = _fork(simulation, state)
            move(following)
            actions += 1
            fingerprint = _fingerprint(following)
            if fingerprint not in seen:
                seen.add(fingerprint)
                todo.append(following)
                if len(seen) > max_states:
                    raise RuntimeError(
                        f"more than {max_states:,} worlds: explore something smaller, or simulate"
                    )
    return Exploration(len(seen), courses, actions)


def _judge(simulation: Simulation, state: _State) -> None:
    try:
        settled(state.world)
        for invariant in simulation.invariants:
            invariant(state.world)
    except AssertionError as error:
        raise Counterexample(error, state.steps) from error


# --- what can happen next

_Move = Callable[[_State], None]


def _moves(simulation: Simulation, state: _State) -> Iterator[_Move]:
    if state.asked < len(simulation.requests):
        yield lambda after: _ask(simulation, after)
    for name, node in state.world.nodes.items():
        for at, message in enumerate(node.queue):
            budget = state.budget if at == 0 else state.budget.without("reorders")
            if budget.reorders < 0:
                break
            yield _take(name, at, message, budget, None)
            if budget.crashes:
                for crash in _CRASHES:
                    yield _take(name, at, message, budget.without("crashes"), crash)
        if node.queue and state.budget.duplicates:
            yield _duplicate(name)
        if node.unsent():
            yield _relay(name)
        due = node.next_due()
        if due is not None and due <= state.world.now:
            yield _sweep(name)
    if _at_rest(simulation, state):
        timers = [
            due for node in state.world.nodes.values() if (due := node.next_due()) is not None
        ]
        if timers and min(timers) > state.world.now:
            yield lambda after: _let_time_pass(after, min(timers))


def _at_rest(simulation: Simulation, state: _State) -> bool:
    nodes = state.world.nodes.values()
    return state.asked == len(simulation.requests) and not any(
        node.queue or node.unsent() for node in nodes
    )


def _ask(simulation: Simulation, state: _State) -> None:
    request = simulation.requests[state.asked]
    state.asked += 1
    with Session(state.world[request.service].engine) as session, session.begin():
        request.run(session)
    state.steps.append(
        Step(f"{request.service}: {request.name}", "client", request.service, request.name)
    )


def _take(name: str, at: int, message: Message, budget: Budget, crash: str | None) -> _Move:
    def take(state: _State) -> None:
        node = state.world[name]
        state.budget = budget
        taken = node.queue.pop(at)
        held = (node, taken)
        state.world.in_hand.append(held)
        process = state.world.hub.start(f"{name} worker", name, lambda: node.receive(taken))
        died = _run(process, crash)
        if died:
            process.kill()
        if held in state.world.in_hand:
            state.world.in_hand.remove(held)
            node.queue.append(taken.again())
        note = f", and dies at {crash}" if died else ""
        state.steps.append(
            Step(
                f"{name}: takes {message}{note}", _source_of(message), name, f"{message.type}{note}"
            )
        )

    return take


def _run(process: Process, until: str | None) -> bool:
    """Run to the end, or until the process stands at the point *until*: True then."""
    while not process.finished:
        process.go_on()
        if until is not None and not process.finished and process.at == until:
            return True
    return False


def _relay(name: str) -> _Move:
    def relay(state: _State) -> None:
        _run(state.world.hub.start(f"{name} relay", name, state.world[name].relay), None)

    return relay


def _sweep(name: str) -> _Move:
    def sweep(state: _State) -> None:
        _run(state.world.hub.start(f"{name} sweeper", name, state.world[name].sweep), None)

    return sweep


def _duplicate(name: str) -> _Move:
    def duplicate(state: _State) -> None:
        state.budget = state.budget.without("duplicates")
        node = state.world[name]
        node.queue.append(node.queue[0])
        state.steps.append(
            Step(
                f"{name}: {node.queue[0]} comes twice",
                "broker",
                name,
                f"{node.queue[0].type} again",
            )
        )

    return duplicate


def _let_time_pass(state: _State, until: datetime) -> None:
    state.world.now = until
    state.steps.append(Step(f"-- it is {until:%H:%M:%S}", "clock", "clock", f"{until:%H:%M:%S}"))


def _source_of(message: Message) -> str:
    return "itself" if message.handler else decode(message.body).source


# --- worlds


def _fork(simulation: Simulation, state: _State) -> _State:
    """A copy of the world to go on from. Only at rest: no transaction is open then."""
    world = World(simulation.services)
    world.now = state.world.now
    for name, node in world.nodes.items():
        origin = state.world[name]
        node.database.storage.copy_from(origin.database.storage)
        node.queue = list(origin.queue)
        node.sent = set(origin.sent)
    return _State(world, state.budget, list(state.steps), state.asked)


def _fingerprint(state: _State) -> bytes:
    names = _names(state.world)
    parts = [repr((state.budget, state.asked))]
    for name, node in state.world.nodes.items():
        queue = sorted(
            f"{names.get(one.event_id)} {one.handler} {one.redelivered}" for one in node.queue
        )
        parts.append(
            f"{name} {queue} {sorted(names.get(row['event_id'], '') for row in node.unsent())}"
        )
        for table in node.database.storage.tables.values():
            rows = sorted(
                _row(row.committed, names)
                for row in table.rows.values()
                if row.committed is not None
            )
            if rows:
                parts.append(f"{name} {table.name} {rows}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()


def _row(values: dict[str, Any], names: dict[UUID, str]) -> str:
    shown = {}
    for name, value in values.items():
        if name in _VOLATILE or isinstance(value, datetime):
            continue
        if isinstance(value, list):
            value = sorted(names.get(one, str(one)) for one in value)
        shown[name] = names.get(value, str(value)) if isinstance(value, UUID) else value
    return repr(shown)


def _names(world: World) -> dict[UUID, str]:
    """A name for each event that does not depend on its id."""
    envelopes = {}
    for node in world.nodes.values():
        for table, column in (
            ("outbox_event", "body"),
            ("pending_delivery", "body"),
            ("saga_step", "trigger"),
        ):
            for row in node.rows(table):
                envelope = decode(row[column])
                envelopes[envelope.id] = envelope
    names: dict[UUID, str] = {}

    def name(event_id: UUID | None) -> str:
        if event_id is None or event_id not in envelopes:
            return ""
        if event_id not in names:
            envelope = envelopes[event_id]
            step = envelope.data.get("step", "") if isinstance(envelope.data, dict) else ""
            names[event_id] = (
                f"{envelope.source}/{envelope.type}/{step}<{name(envelope.causation_id)}"
            )
        return names[event_id]

    for event_id in envelopes:
        name(event_id)
    return names


def sequence_diagram(steps: Sequence[Step]) -> str:
    """A course as a Mermaid sequence diagram."""
    lines = ["sequenceDiagram"]
    for step in steps:
        source = step.target if step.source == "itself" else step.source
        arrow = "-x" if "dies" in step.label else "->>"
        lines.append(f"  {source}{arrow}{step.target}: {step.label.replace(':', '')}")
    return "\n".join(lines) + "\n"
