"""`explore`: every course that a small choreography can take, instead of a sample of them.

A course is a sequence of whole actions: a service handles one message, a worker dies in it, a message comes twice, time
passes. Messages come in every order. Two courses that lead to the same world need be followed only once. What is found
is drawn as a sequence diagram.

How so many worlds can be followed: services share nothing but messages. What a service makes of a message depends on
its own database, the message and the time; so the real code runs once for each of these, and its outcome (another
database, and what was sent) holds in every world. A world is then a few numbers: where each service stands, and which
messages are under way. Ids are made of what events say (`saga.testing.naming`), so that what was stored in one course
and sent in another still fits together.

What is left out, and why nothing is missed: relays and sweepers send at once. A message that was sent and is not taken
yet is to everyone as one that is not sent yet, and any message may be taken next. A relay that dies sends twice, as a
message that comes twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from sqlalchemy.orm import Session

from outbox.envelope import decode
from saga.testing.model.storage import Storage
from saga.testing.naming import Naming
from saga.testing.processes import Process
from saga.testing.simulation import Simulation, settled
from saga.testing.world import Message, Node, World

_CRASHES: Final = ("commit", "committed", "before ack")
_VOLATILE: Final = frozenset({"ordinal", "position", "xid", "sends", "traceback"})
"""What depends on the order in which independent things were done, and on nothing else."""


@dataclass(frozen=True)
class Budget:
    """How many faults a course may have. None: one at each delivery of each message."""

    duplicates: int | None = 1
    crashes: int | None = 1


@dataclass(frozen=True)
class Exploration:
    """What was explored."""

    states: int
    """Distinct worlds that were reached."""
    ends: frozenset[bytes]
    """Distinct worlds in which nothing moved any more, by their `fingerprint`."""
    actions: int
    """Steps from one world to another that were followed."""
    handled: int
    """How often the services' code was run for it."""


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


def explore(
    simulation: Simulation, budget: Budget | None = None, *, max_states: int = 1_000_000
) -> Exploration:
    """Follow every course of *simulation* within *budget*. Raises `Counterexample` for one that breaks an invariant.

    Raises `RuntimeError` where there are more than *max_states* worlds: the choreography is not small.
    """
    explorer = _Explorer(simulation)
    with explorer.naming.applied():
        return explorer.explore(budget or Budget(), max_states)


class _Move(NamedTuple):
    """One action, at one service (-1: time passes everywhere)."""

    kind: str
    """ask, take, sweep, twice or wait; of a take that ends in a crash, where."""
    at: int
    what: int = 0
    """Which message, or which request."""


class _State(NamedTuple):
    """One world: where each service stands, what is under way, the time, and what may still break."""

    stands: tuple[int, ...]
    flying: tuple[tuple[int, int], ...]
    """(service, message), sorted."""
    asked: int
    now: datetime
    budget: tuple[int | None, int | None]


class _Outcome(NamedTuple):
    """What a service made of something."""

    stand: int
    sent: tuple[tuple[int, int], ...]
    died: bool


@dataclass(frozen=True)
class _Stand:
    """A service's database at rest."""

    rows: Storage
    fingerprint: bytes
    due: datetime | None


class _Explorer:
    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.naming = Naming()
        self.names = [one.service.name for one in simulation.services]
        self._stands: list[_Stand] = []
        self._by_fingerprint: dict[tuple[int, bytes], int] = {}
        self._messages: list[tuple[Message, bool]] = []
        self._numbers: dict[tuple[Message, bool], int] = {}
        self._outcomes: dict[tuple[_Move, int, datetime], _Outcome] = {}

    def explore(self, budget: Budget, max_states: int) -> Exploration:
        world = World(self.simulation.services)
        stands = tuple(self._stand(at, node) for at, node in enumerate(world.nodes.values()))
        start = _State(stands, (), 0, world.now, (budget.duplicates, budget.crashes))
        came_from: dict[_State, tuple[_State, _Move] | None] = {start: None}
        todo, ends, actions = deque([start]), set[bytes](), 0
        while todo:
            state = todo.popleft()
            ended = True
            for move, following in self._following(state):
                ended = False
                actions += 1
                if following not in came_from:
                    came_from[following] = state, move
                    todo.append(following)
            if ended:
                ends.add(self._judge(state, came_from))
            if len(came_from) > max_states:
                raise RuntimeError(
                    f"more than {max_states:,} worlds: explore something smaller, or simulate"
                )
        return Exploration(len(came_from), frozenset(ends), actions, len(self._outcomes))

    # --- from one world to the next

    def _following(self, state: _State) -> Iterator[tuple[_Move, _State]]:
        if state.asked < len(self.simulation.requests):
            service = self.simulation.requests[state.asked].service
            move = _Move("ask", self.names.index(service), state.asked)
            outcome = self._outcome(move, state)
            yield move, _after(state._replace(asked=state.asked + 1), move, outcome)
        duplicates, crashes = state.budget
        for at, what in dict.fromkeys(state.flying):
            message, is_copy = self._messages[what]
            taken = state._replace(flying=_without(state.flying, (at, what)))
            move = _Move("take", at, what)
            yield move, _after(taken, move, self._outcome(move, state))
            if crashes is None or crashes > 0:
                for where in () if crashes is None and message.redelivered else _CRASHES:
                    move = _Move(where, at, what)
                    outcome = self._outcome(move, state)
                    if outcome.died:
                        cut_off = taken._replace(budget=(duplicates, _less(crashes)))
                        yield move, _after(cut_off, move, outcome)
            if (duplicates is None or duplicates > 0) and not is_copy:
                copy = at, self._number(message, is_copy=True)
                flying = tuple(sorted([*taken.flying, copy, copy]))
                budget = _less(duplicates), crashes
                yield _Move("twice", at, what), taken._replace(flying=flying, budget=budget)
        if not state.flying and state.asked == len(self.simulation.requests):
            yield from self._wait(state)

    def _wait(self, state: _State) -> Iterator[tuple[_Move, _State]]:
        dues = [due for one in state.stands if (due := self._stands[one].due) is not None]
        if not dues:
            return
        later = state._replace(now=max(state.now, min(dues)))
        for at, stand in enumerate(state.stands):
            due = self._stands[stand].due
            if due is not None and due <= later.now:
                move = _Move("sweep", at)
                later = _after(later, move, self._outcome(move, later))
        yield _Move("wait", -1), later

    def _outcome(self, move: _Move, state: _State) -> _Outcome:
        """What the service makes of it, where it stands; found out by running its code, once."""
        key = move, state.stands[move.at], state.now
        if key not in self._outcomes:
            self._outcomes[key] = self._run(*key)
        return self._outcomes[key]

    def _run(self, move: _Move, stand: int, now: datetime) -> _Outcome:
        world = World(self.simulation.services)
        world.now = now
        node = world[self.names[move.at]]
        node.database.storage.copy_from(self._stands[stand].rows)
        before = [one.database.storage.commits for one in world.nodes.values()]
        node.sent = {row["position"] for row in node.rows("outbox_event")}
        message, is_copy = None, False
        died = False
        if move.kind == "ask":
            request = self.simulation.requests[move.what]
            self.naming.begin(f"{node.name} request {move.what}", now)
            with Session(node.engine) as session, session.begin():
                request.run(session)
        elif move.kind != "sweep":
            message, is_copy = self._messages[move.what]
            self.naming.begin(f"{node.name} {message.event_id} {message.handler}", now)
            died = _take(node, message, None if move.kind == "take" else move.kind)
        _send_all(node)
        for other, commits in zip(world.nodes.values(), before, strict=True):
            if other is not node and other.database.storage.commits != commits:
                raise RuntimeError(f"{node.name} has written into the database of {other.name}")
        sent = []
        for to, other in enumerate(world.nodes.values()):
            for one in other.queue:
                again = message is not None and other is node and one == message.again()
                sent.append((to, self._number(one, is_copy=is_copy and again)))
        return _Outcome(self._stand(move.at, node), tuple(sent), died)

    # --- numbers for what worlds are made of

    def _stand(self, at: int, node: Node) -> int:
        found = _fingerprint_of(node)
        if (at, found) not in self._by_fingerprint:
            rows = Storage(node.database.storage.wait, node.database.storage.clock)
            rows.copy_from(node.database.storage)
            self._by_fingerprint[at, found] = len(self._stands)
            self._stands.append(_Stand(rows, found, node.next_due()))
        return self._by_fingerprint[at, found]

    def _number(self, message: Message, *, is_copy: bool) -> int:
        key = message, is_copy
        if key not in self._numbers:
            self._numbers[key] = len(self._messages)
            self._messages.append(key)
        return self._numbers[key]

    # --- the end of a course

    def _judge(self, state: _State, came_from: dict[_State, tuple[_State, _Move] | None]) -> bytes:
        world = World(self.simulation.services)
        world.now = state.now
        for stand, node in zip(state.stands, world.nodes.values(), strict=True):
            node.database.storage.copy_from(self._stands[stand].rows)
        try:
            settled(world)
            for invariant in self.simulation.invariants:
                invariant(world)
        except AssertionError as error:
            raise Counterexample(error, self._course(state, came_from)) from error
        return fingerprint(world)

    def _course(
        self, state: _State, came_from: dict[_State, tuple[_State, _Move] | None]
    ) -> list[Step]:
        steps: list[Step] = []
        while (before := came_from[state]) is not None:
            steps.append(self._step(before[1], state))
            state = before[0]
        return steps[::-1]

    def _step(self, move: _Move, after: _State) -> Step:
        if move.kind == "wait":
            return Step(f"-- it is {after.now:%H:%M:%S}", "clock", "clock", f"{after.now:%H:%M:%S}")
        name = self.names[move.at]
        if move.kind == "ask":
            request = self.simulation.requests[move.what].name
            return Step(f"{name}: {request}", "client", name, request)
        message, _ = self._messages[move.what]
        if move.kind == "twice":
            return Step(f"{name}: {message} comes twice", "broker", name, f"{message.type} again")
        note = "" if move.kind == "take" else f", and dies at {move.kind}"
        source = name if message.handler else decode(message.body).source
        return Step(f"{name}: takes {message}{note}", source, name, f"{message.type}{note}")


def _after(state: _State, move: _Move, outcome: _Outcome) -> _State:
    stands = (*state.stands[: move.at], outcome.stand, *state.stands[move.at + 1 :])
    return state._replace(stands=stands, flying=tuple(sorted([*state.flying, *outcome.sent])))


def _less(budget: int | None) -> int | None:
    return None if budget is None else budget - 1


def _without(
    flying: tuple[tuple[int, int], ...], one: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    at = flying.index(one)
    return flying[:at] + flying[at + 1 :]


def _take(node: Node, message: Message, crash: str | None) -> bool:
    """Handle *message*, with a worker that dies at *crash*; whether it did."""
    held = (node, message)
    node.world.in_hand.append(held)
    worker = node.world.hub.start(f"{node.name} worker", node.name, lambda: node.receive(message))
    died = _run(worker, crash)
    if died:
        worker.kill()
    if held in node.world.in_hand:
        node.world.in_hand.remove(held)
        node.queue.append(message.again())
    return died


def _send_all(node: Node) -> None:
    """Let relay and sweeper send all that there is to send."""
    while True:
        due = node.next_due()
        if node.unsent():
            _run(node.world.hub.start(f"{node.name} relay", node.name, node.relay), None)
        elif due is not None and due <= node.world.now:
            _run(node.world.hub.start(f"{node.name} sweeper", node.name, node.sweep), None)
        else:
            return


def _run(process: Process, until: str | None) -> bool:
    """Run to the end, or until the process stands at the point *until*: True then."""
    while not process.finished:
        process.go_on()
        if until is not None and not process.finished and process.at == until:
            return True
    return False


# --- comparing worlds


def fingerprint(world: World) -> bytes:
    """What tells one world at rest from another, whose events were named alike."""
    found = b"".join(_fingerprint_of(node) for node in world.nodes.values())
    return blake2b(found, digest_size=16).digest()


def _fingerprint_of(node: Node) -> bytes:
    parts = [node.name]
    for table in node.database.storage.tables.values():
        rows = [_row(row.committed) for row in table.rows.values() if row.committed is not None]
        if rows:
            parts.append(f"{table.name} {sorted(rows)}")
    return blake2b("\n".join(parts).encode(), digest_size=16).digest()


def _row(values: dict[str, Any]) -> str:
    return repr({name: value for name, value in values.items() if not _is_volatile(name, value)})


def _is_volatile(name: str, value: object) -> bool:
    is_drawn = name == "id" and isinstance(value, int)
    return name in _VOLATILE or is_drawn or isinstance(value, datetime)


def sequence_diagram(steps: Sequence[Step]) -> str:
    """A course as a Mermaid sequence diagram."""
    lines = ["sequenceDiagram"]
    for step in steps:
        arrow = "-x" if "dies" in step.label else "->>"
        lines.append(f"  {step.source}{arrow}{step.target}: {step.label.replace(':', '')}")
    return "\n".join(lines) + "\n"
