"""The flow of events between participants, as a graph that checks and drawings read.

An *action* is a start, a step or a join. Action B follows action A where A emits an event that B
takes. A *saga* is all that can follow from one start. An action that answers with one of several
events makes a choice; a *way* is the saga with every choice made, so that on it each action either
runs or does not. What must have happened before an action runs is then a dominator question: of a
step, what all producers of its trigger have in common; of a join, that of each of its events
together (Prosser 1959 for the term; the graphs here are small, so a plain fixed point does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeVar

from saga.choreography import DeadlineSpec, EventRef, Exhausted, Place
from saga.contract import Contract

Kind = Literal["start", "step", "join"]
T = TypeVar("T")

_MOST_WAYS: Final = 512
"""A saga with more is looked at as if every answer were given at once, which finds too much rather
than too little."""


@dataclass(frozen=True, eq=False)
class Action:
    """Something that a participant does in one transaction. One object each, so compared as such."""

    kind: Kind
    participant: str
    name: str
    on: tuple[EventRef, ...]
    emits: tuple[EventRef, ...]
    rejects: tuple[EventRef, ...]
    place: Place
    completes: bool = False
    compensation: Place | None = None
    nothing_to_undo: str | None = None
    exhausted: Exhausted = "stuck"
    external: bool = False
    resolves: bool = False
    retriable: bool = False
    needs: int | None = None
    """How many of its events it waits for; None: all."""
    no_deadline: str | None = None

    @property
    def enough(self) -> int:
        return len(self.on) if self.needs is None else self.needs

    @property
    def can_abort(self) -> bool:
        """Whether its outcome can be the end of the saga."""
        return bool(self.rejects) or self.exhausted == "abort"

    @property
    def can_be_undone(self) -> bool:
        return self.compensation is not None or self.nothing_to_undo is not None

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The types of which it emits one, whatever their versions."""
        return tuple(dict.fromkeys(ref.name for ref in self.emits))

    def __str__(self) -> str:
        return f"{self.participant}.{self.name}"


class Way:
    """One way through a saga: what runs on it, and what has surely run before that."""

    def __init__(
        self, actions: Iterable[Action], start: Action, chosen: Mapping[Action, str]
    ) -> None:
        self.chosen = dict(chosen)
        """What each action that has a choice answers with."""
        self._everything = tuple(actions)
        self._start = start

    def answers(self, action: Action) -> tuple[str, ...]:
        """What *action* emits on this way."""
        if action not in self.chosen:
            return action.answers
        return (self.chosen[action],) if self.chosen[action] else ()

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """What runs: a step once its event is there, a join once enough of its events are."""
        running, events = {self._start}, set(self.answers(self._start))
        grown = True
        while grown:
            ready = {
                action for action in self._everything
                if action.on and action not in running
                and sum(ref.name in events for ref in action.on) >= action.enough
            }  # fmt: skip
            running |= ready
            events.update(name for action in ready for name in self.answers(action))
            grown = bool(ready)
        return tuple(action for action in self._everything if action in running)

    @cached_property
    def decisions(self) -> tuple[Action, ...]:
        return tuple(action for action in self.actions if action.completes)

    @cached_property
    def aborters(self) -> tuple[Action, ...]:
        return tuple(action for action in self.actions if action.can_abort)

    def producers(self, name: str) -> list[Action]:
        return self._producers.get(name, [])

    @cached_property
    def _producers(self) -> dict[str, list[Action]]:
        return _by_name((name, one) for one in self.actions for name in self.answers(one))

    def follows(self, action: Action) -> set[Action]:
        """What can follow *action*, directly or not; itself only on a circle."""
        return _closure(action, self._directly_after)

    def _directly_after(self, action: Action) -> list[Action]:
        said = self.answers(action)
        return [other for other in self.actions if any(ref.name in said for ref in other.on)]

    @cached_property
    def before(self) -> dict[Action, frozenset[Action]]:
        """For each action that runs, those that have surely succeeded by then."""
        everything = frozenset(self.actions)
        before = {
            action: everything if action.on else frozenset[Action]() for action in self.actions
        }
        changed = True
        while changed:
            changed = False
            for action in self.actions:
                known = self._surely_before(action, before)
                if known != before[action]:
                    before[action], changed = known, True
        return before

    def _surely_before(
        self, action: Action, before: Mapping[Action, frozenset[Action]]
    ) -> frozenset[Action]:
        ways_in = [
            frozenset.intersection(*(before[producer] | {producer} for producer in producers))
            for ref in action.on
            if (producers := self.producers(ref.name))
        ]
        # Whichever of the events it is that are enough, one of so many is among them.
        seen = len(ways_in) - action.enough
        return frozenset(
            one
            for one in frozenset[Action]().union(*ways_in)
            if sum(one in way_in for way_in in ways_in) > seen
        )


class Saga:
    """A start and all that can follow from it."""

    def __init__(self, flow: Flow, start: Action) -> None:
        self._flow = flow
        self.start = start
        reached = _closure(start, flow.after) | {start}
        self.actions = tuple(action for action in flow.actions if action in reached)
        self.all_at_once = Way(self.actions, start, {})
        """Every answer given at once: more than can happen, and nothing that can happen is missing."""

    @cached_property
    def ways(self) -> tuple[Way, ...]:
        ways: list[Way] = []
        todo: list[dict[Action, str]] = [{}]
        while todo:
            chosen = todo.pop()
            undecided = {action: "" for action in self.actions if len(action.answers) > 1}
            way = Way(self.actions, self.start, {**undecided, **chosen})
            at = next((one for one in way.actions if way.chosen.get(one) == ""), None)
            if at is None:
                ways.append(Way(self.actions, self.start, chosen))
            else:
                todo += [{**chosen, at: name} for name in reversed(at.answers)]
            if len(ways) + len(todo) > _MOST_WAYS:
                return (self.all_at_once,)
        return tuple(ways)

    @cached_property
    def deadlines(self) -> tuple[DeadlineSpec, ...]:
        """Deadlines that count from one of its actions."""
        inside = {(action.participant, action.name) for action in self.actions}
        return tuple(one for one in self._flow.deadlines if (one.participant, one.after) in inside)

    def __str__(self) -> str:
        return f"the saga of {self.start.emits[0].name}"


class Flow:
    """All actions of the contracts given, and how they follow from one another."""

    def __init__(self, contracts: Iterable[Contract]) -> None:
        self.contracts = tuple(contracts)
        self.actions = tuple(action for contract in self.contracts for action in _actions(contract))
        self.deadlines = tuple(
            one for contract in self.contracts for one in contract.participant.deadlines
        )

    @cached_property
    def sagas(self) -> tuple[Saga, ...]:
        return tuple(Saga(self, action) for action in self.actions if action.kind == "start")

    @cached_property
    def producers(self) -> dict[str, list[Action]]:
        """Who emits an event type, by its name."""
        return _by_name((name, action) for action in self.actions for name in action.answers)

    @cached_property
    def consumers(self) -> dict[str, list[Action]]:
        """Which actions take an event type, by its name."""
        return _by_name((ref.name, action) for action in self.actions for ref in action.on)

    @cached_property
    def subscribers(self) -> dict[str, list[Contract]]:
        """Who takes an event type without being part of the saga, by its name."""
        return _by_name((ref.name, one) for one in self.contracts for ref in one.subscribes)

    @cached_property
    def publishers(self) -> dict[str, list[Contract]]:
        """Who publishes an event type outside of its steps and joins, by its name."""
        return _by_name((ref.name, one) for one in self.contracts for ref in one.publishes)

    def after(self, action: Action) -> list[Action]:
        """The actions that can follow *action* directly."""
        found = [taker for name in action.answers for taker in self.consumers.get(name, ())]
        return list(dict.fromkeys(found))

    def cycles(self) -> list[list[Action]]:
        """Groups of steps that follow from one another in a circle. A join bounds a circle: it runs
        once in a saga."""
        reach = {
            action: _closure(action, lambda one: [a for a in self.after(one) if a.kind != "join"])
            for action in self.actions
            if action.kind != "join"
        }
        groups: list[list[Action]] = []
        for action, followers in reach.items():
            if action in followers and not any(action in group for group in groups):
                groups.append([o for o in reach if o in followers and action in reach[o]])
        return groups


def _closure(start: Action, after: Callable[[Action], Iterable[Action]]) -> set[Action]:
    seen: set[Action] = set()
    todo = list(after(start))
    while todo:
        at = todo.pop()
        if at not in seen:
            seen.add(at)
            todo += after(at)
    return seen


def _by_name(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for name, one in pairs:
        if one not in found.setdefault(name, []):
            found[name].append(one)
    return found


def _actions(contract: Contract) -> Iterator[Action]:
    spec = contract.participant
    for start in spec.starts:
        yield Action(
            kind="start", participant=spec.name, name=f"start:{start.event.name}", on=(),
            emits=(start.event,), rejects=(), place=start.place, compensation=start.compensation,
            nothing_to_undo=start.nothing_to_undo,
        )  # fmt: skip
    for step in spec.steps:
        yield Action(
            kind="step", participant=spec.name, name=step.name, on=(step.on,), emits=step.emits,
            rejects=step.rejects, place=step.place, compensation=step.compensation,
            nothing_to_undo=step.nothing_to_undo, exhausted=step.exhausted,
            external=step.external, resolves=step.resolves, completes=step.pivot,
            retriable=step.retriable, no_deadline=step.no_deadline,
        )  # fmt: skip
    for join in spec.joins:
        yield Action(
            kind="join", participant=spec.name, name=join.name, on=join.on, emits=join.emits,
            rejects=join.rejects, place=join.place, completes=join.completes,
            compensation=join.compensation, nothing_to_undo=join.nothing_to_undo,
            exhausted=join.exhausted, needs=join.needs, no_deadline=join.no_deadline,
        )  # fmt: skip
