"""`simulate`: thousands of schedules of the real services' code, each from one seed, until one breaks an invariant.

One thread runs everything. At each turn the scheduler picks, from the seed, who takes the next step (a statement, a
commit, a message, an ack) or what breaks: a process is killed, a connection is lost (also in mid-commit, with the
outcome hidden), a message comes twice, a service is out for a while or for as long as any other has work, time jumps.
When nothing moves any more and nothing is due, every saga must have ended and the invariants must hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy.orm import Session

from saga.testing.choices import Choices, Replayed, Seeded, shrink
from saga.testing.choreography import acquaint
from saga.testing.processes import Process
from saga.testing.world import Node, SimulatedService, World

Invariant = Callable[[World], None]
"""Looks at the settled world and raises `AssertionError` saying what is wrong."""


@dataclass(frozen=True)
class Faults:
    """How often each thing may break in one schedule."""

    kills: int = 2
    lost_connections: int = 2
    duplicates: int = 2
    outages: int = 1
    time_jumps: int = 1
    any_order: bool = True
    """Whether a queue's messages may overtake each other."""


@dataclass(frozen=True)
class Request:
    """Something that a client of one service asks for, in a transaction of its own."""

    service: str
    run: Callable[[Session], object]
    name: str = "request"


class Broken(AssertionError):
    """A schedule broke an invariant. `str()` tells the seed and the shortest schedule found that shows it."""

    def __init__(
        self, error: BaseException, seed: int | None, decisions: Sequence[int], trace: Sequence[str]
    ) -> None:
        self.error, self.seed, self.decisions, self.trace = (
            error,
            seed,
            list(decisions),
            list(trace),
        )
        lines = "\n".join(f"  {number:3} {line}" for number, line in enumerate(self.trace, 1))
        super().__init__(
            f"{type(error).__name__}: {error}\n\nseed {seed}; the shortest schedule found:\n{lines}\n\n"
            f"replay it with simulation.replay({self.decisions})"
        )


@dataclass(frozen=True)
class Report:
    """What a simulation did."""

    schedules: int
    turns: int
    faults: int
    first_seed: int


@dataclass
class Simulation:
    """Services, what is asked of them, and what must hold in the end."""

    services: Sequence[SimulatedService]
    requests: Sequence[Request]
    invariants: Sequence[Invariant] = ()
    faults: Faults = field(default_factory=Faults)
    sample: int | None = None
    """How many of the requests each schedule makes, drawn from its seed; None: all, in their order."""
    batch: int = 1
    """How many messages a worker may take in one transaction, as with `--outbox-batch`."""
    operator: Callable[[World], bool] | None = None
    """What a person does once nothing moves and nothing is due; whether there was anything to do."""
    max_turns: int = 20_000
    """A schedule that has not settled after this many turns counts as broken."""

    def __post_init__(self) -> None:
        acquaint({one.service: one.engine for one in self.services})

    def run(self, schedules: int, seed: int = 0) -> Report:
        """Run *schedules* schedules with the seeds from *seed* on. Raises `Broken` for the first that breaks."""
        turns = faults = 0
        for number in range(seed, seed + schedules):
            run = _Run(self, Seeded(number))
            try:
                run.to_the_end()
            except Exception as error:
                raise self._shrunk(error, number, run.choices.made) from error
            turns += run.turns
            faults += run.broken
        return Report(schedules, turns, faults, seed)

    def replay(self, decisions: Sequence[int]) -> World:
        """Run one schedule again, as its decisions were; what breaks is raised as it is."""
        run = _Run(self, Replayed(decisions))
        run.to_the_end()
        return run.world

    def first_failure(self, schedules: int, seed: int = 0) -> int | None:
        """The number of schedules after which something broke, or None; for showing that a mutant is found."""
        for number in range(seed, seed + schedules):
            try:
                _Run(self, Seeded(number)).to_the_end()
            except Exception:
                return number - seed + 1
        return None

    def _shrunk(self, error: Exception, seed: int, decisions: Sequence[int]) -> Broken:
        def fails(candidate: Sequence[int]) -> bool:
            try:
                _Run(self, Replayed(candidate)).to_the_end()
            except Exception as again:
                return type(again) is type(error)
            return False

        shortest = shrink(decisions, fails)
        run = _Run(self, Replayed(shortest))
        try:
            run.to_the_end()
        except Exception as again:
            error = again
        return Broken(error, seed, shortest, run.world.trace)


Action = Callable[[], None]


_LONGEST_OUTAGE: Final = 60
"""Turns; but every fourth outage lasts until nobody else has anything left to do."""


class _Run:
    """One schedule."""

    def __init__(self, simulation: Simulation, choices: Choices) -> None:
        self.simulation = simulation
        self.choices = choices
        self.world = World(simulation.services)
        self.requests = self._drawn()
        self.turns = self.broken = 0
        faults = simulation.faults
        self.left = {
            "kill": faults.kills, "lose": faults.lost_connections, "duplicate": faults.duplicates,
            "outage": faults.outages, "jump": faults.time_jumps,
        }  # fmt: skip

    def to_the_end(self) -> None:
        while self.turns < self.simulation.max_turns:
            self.turns += 1
            self._recover()
            actions = list(self._steps())
            if actions:
                self._pick(actions)
            elif not (self._to_next_timer() or self._operate()):
                break
            self._report_errors()
        else:
            raise AssertionError(
                f"nothing has settled after {self.turns} turns; still moving: {self._moving()}"
            )
        settled(self.world)
        for invariant in self.simulation.invariants:
            invariant(self.world)

    def _drawn(self) -> list[Request]:
        requests = list(self.simulation.requests)
        if self.simulation.sample is None:
            return requests
        return [
            requests.pop(self.choices.pick(len(requests))) for _ in range(self.simulation.sample)
        ]

    # --- what can happen next

    def _pick(self, actions: list[Action]) -> None:
        # Faults are rare enough that a run gets somewhere, and a process mostly goes on where it stands.
        is_due = any(self.left.values()) and self.choices.pick(12, dull=0.5) == 11
        if is_due and (faults := list(self._faults())):
            what, act = faults[self.choices.pick(len(faults))]
            self.broken += 1
            self.world.say(f"!! {what}")
        else:
            act = actions[self.choices.pick(len(actions), dull=0.4)]
        act()

    def _steps(self) -> Iterator[Action]:
        for process in self.world.hub.processes:
            if process.ready and not self._is_down(process):
                yield process.go_on
        if self.requests:
            yield self._ask
        for node in self.world.nodes.values():
            if node.down_for:
                continue
            busy = sum(held is node for held, _ in self.world.in_hand)
            if node.queue and busy < node.workers:
                reach = len(node.queue) if self.simulation.faults.any_order else 1
                for at in range(min(reach, 8)):
                    yield self._taker(node, at)
            if not self._running(f"{node.name} relay") and node.unsent():
                yield self._starter(node, "relay", node.relay)
            due = node.next_due()
            if (
                due is not None
                and due <= self.world.now
                and not self._running(f"{node.name} sweeper")
            ):
                yield self._starter(node, "sweeper", node.sweep)

    def _faults(self) -> Iterator[tuple[str, Action]]:
        for process in self.world.hub.processes:
            if process.finished:
                continue
            if self.left["kill"]:
                yield f"kill {process.name} at {_brief(process.at)}", self._killer(process)
            if self.left["lose"] and any(not one.closed for one in process.connections):
                yield (
                    f"{process.name} loses its connection at {_brief(process.at)}",
                    self._loser(process),
                )
        for node in self.world.nodes.values():
            if self.left["duplicate"] and node.queue:
                yield f"{node.name}: {node.queue[0]} comes twice", self._duplicator(node)
            if self.left["outage"] and not node.down_for:
                yield f"{node.name} is out", self._outage(node)
        if self.left["jump"]:
            yield "two minutes pass", partial(self._jump, timedelta(minutes=2))
            yield "an hour passes", partial(self._jump, timedelta(hours=1))

    # --- doing it

    def _ask(self) -> None:
        request = self.requests.pop(0)
        self.world.say(f"{request.service}: {request.name}")
        node = self.world[request.service]

        def run() -> None:
            with Session(node.engine) as session, session.begin():
                request.run(session)

        self._start(f"{request.service} {request.name}", node, run)

    def _taker(self, node: Node, at: int) -> Callable[[], None]:
        def take() -> None:
            taken = [node.queue.pop(at)]
            if self.simulation.batch > 1:
                more = self.choices.pick(min(self.simulation.batch, len(node.queue) + 1))
                taken += [node.queue.pop(0) for _ in range(more)]
            self.world.say(f"{node.name}: takes {', '.join(map(str, taken))}")
            self.world.in_hand += [(node, message) for message in taken]
            process = self._start(f"{node.name} worker", node, lambda: node.receive(*taken))
            process.messages = taken

        return take

    def _starter(self, node: Node, role: str, run: Callable[[], None]) -> Callable[[], None]:
        def start() -> None:
            self.world.say(f"{node.name}: {role}")
            self._start(f"{node.name} {role}", node, run)

        return start

    def _start(self, name: str, node: Node, run: Callable[[], None]) -> Process:
        process = self.world.hub.start(name, node.name, run)
        process.go_on()
        return process

    def _killer(self, process: Process) -> Callable[[], None]:
        def kill() -> None:
            self.left["kill"] -= 1
            process.kill()
            self._give_back(process)

        return kill

    def _loser(self, process: Process) -> Callable[[], None]:
        def lose() -> None:
            self.left["lose"] -= 1
            process.lose_connection()

        return lose

    def _duplicator(self, node: Node) -> Callable[[], None]:
        def duplicate() -> None:
            self.left["duplicate"] -= 1
            node.queue.append(node.queue[0])

        return duplicate

    def _outage(self, node: Node) -> Callable[[], None]:
        def go_down() -> None:
            self.left["outage"] -= 1
            turns = self.choices.pick(_LONGEST_OUTAGE * 4 // 3)
            node.down_for = 1 + turns if turns < _LONGEST_OUTAGE else math.inf
            for process in [
                one
                for one in self.world.hub.processes
                if one.service == node.name and not one.finished
            ]:
                process.kill()
                self._give_back(process)

        return go_down

    def _jump(self, by: timedelta) -> None:
        self.left["jump"] -= 1
        self.world.now += by

    def _give_back(self, process: Process) -> None:
        """The broker delivers again what a dead worker had not acked."""
        # Each queue has the same message; only this worker's own are given back.
        for message in process.messages:
            held = next(
                (
                    one
                    for one in self.world.in_hand
                    if one[1] is message and one[0].name == process.service
                ),
                None,
            )
            if held is not None:
                self.world.in_hand.remove(held)
                held[0].queue.append(message.again())

    def _recover(self) -> None:
        for node in self.world.nodes.values():
            node.down_for = max(0, node.down_for - 1)

    def _to_next_timer(self) -> bool:
        """Nothing moves: let time pass until something is due, or a service is back."""
        nodes = self.world.nodes.values()
        out = [node for node in nodes if node.down_for]
        if any(node.down_for < math.inf for node in out):
            return True
        due = [
            moment for node in nodes if node not in out and (moment := node.next_due()) is not None
        ]
        if out and not (due and self.choices.pick(2)):
            for node in out:
                self.world.say(f"-- {node.name} is back")
                node.down_for = 0
            return True
        if not due or self._moving():
            return False
        self.world.now = max(self.world.now, min(due))
        self.world.say(f"-- it is {self.world.now:%H:%M:%S}")
        return True

    def _operate(self) -> bool:
        operator = self.simulation.operator
        if operator is None or self._moving() or not operator(self.world):
            return False
        self.world.say("-- a person has seen to what was stuck")
        return True

    def _running(self, name: str) -> bool:
        return any(
            process.name == name and not process.finished for process in self.world.hub.processes
        )

    def _is_down(self, process: Process) -> bool:
        return self.world[process.service].down_for > 0

    def _moving(self) -> list[str]:
        return [
            f"{one.name} at {_brief(one.at)}"
            for one in self.world.hub.processes
            if not one.finished
        ]

    def _report_errors(self) -> None:
        for process in self.world.hub.sweep():
            if process.messages:
                # The worker gave them back: they come again.
                self._give_back(process)
                self.world.say(
                    f"{process.name} gave {len(process.messages)} back: {type(process.error).__name__}"
                )
            elif not process.name.endswith(("relay", "sweeper")):
                self.world.say(f"{process.name} failed: {type(process.error).__name__}")


def settled(world: World) -> None:
    """What must hold for every choreography: no saga is left open, and nothing waits for a person."""
    for node in world.nodes.values():
        for row in node.rows("saga"):
            assert row["state"] in ("completed", "compensated"), (
                f"{node.name} left saga {str(row['saga_id'])[-4:]} {row['state']}: {row['reason']}"
            )
        for table in ("dead_letter", "quarantine", "pending_delivery"):
            assert not node.rows(table), (
                f"{node.name} has rows in {table}: {_listed(node.rows(table))}"
            )
    ends: dict[Any, set[str]] = {}
    for node in world.nodes.values():
        for row in node.rows("saga"):
            ends.setdefault(row["saga_id"], set()).add(row["state"])
    for saga, states in ends.items():
        assert len(states) == 1, (
            f"saga {str(saga)[-4:]} ended in more than one way: {sorted(states)}"
        )


def _listed(rows: list[dict[str, Any]]) -> str:
    return ", ".join(
        str(row.get("error") or row.get("reason") or row.get("type")) for row in rows[:3]
    )


def _brief(sql: str) -> str:
    return " ".join(sql.split())[:60]
