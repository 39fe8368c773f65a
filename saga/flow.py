"""The flow of events between participants, as a graph that checks and drawings read.

An *action* is a start, a step or a join. Action B follows action A where A emits an event that B takes. What must have
happened before an action runs is a dominator question: of a step, whatever all ways to its trigger have in common; of a
join, that of each of its events together (Lengauer & Tarjan 1979 for the term; the graphs here are small, so a plain
fixed point does).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from saga.choreography import EventRef, Exhausted, Place
from saga.contract import Contract

Kind = Literal["start", "step", "join"]


@dataclass(frozen=True)
class Action:
    """Something that a participant does in one transaction."""

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

    @property
    def can_abort(self) -> bool:
        """Whether its outcome can be the end of the saga."""
        return bool(self.rejects) or self.exhausted == "abort"

    def __str__(self) -> str:
        return f"{self.participant}.{self.name}"


class Flow:
    """All actions of the contracts given, and how they follow from one another."""

    def __init__(self, contracts: Iterable[Contract]) -> None:
        self.contracts = tuple(contracts)
        self.actions = tuple(action for contract in self.contracts for action in _actions(contract))

    @cached_property
    def producers(self) -> dict[str, list[Action]]:
        """Who emits an event type, by its name."""
        found: dict[str, list[Action]] = {}
        for action in self.actions:
            for ref in action.emits:
                found.setdefault(ref.name, []).append(action)
        return found

    @cached_property
    def consumers(self) -> dict[str, list[Action]]:
        """Which actions take an event type, by its name."""
        found: dict[str, list[Action]] = {}
        for action in self.actions:
            for ref in action.on:
                found.setdefault(ref.name, []).append(action)
        return found

    @cached_property
    def subscribers(self) -> dict[str, list[str]]:
        """Who takes an event type without being part of the saga, by its name."""
        found: dict[str, list[str]] = {}
        for contract in self.contracts:
            for name in contract.subscribes:
                found.setdefault(name, []).append(contract.participant.name)
        return found

    def after(self, action: Action) -> list[Action]:
        """The actions that can follow *action* directly."""
        found = [taker for ref in action.emits for taker in self.consumers.get(ref.name, ())]
        return list(dict.fromkeys(found))

    def reachable(self, action: Action) -> set[Action]:
        """The actions that can follow *action*, directly or not; itself only on a cycle."""
        seen: set[Action] = set()
        todo = self.after(action)
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += self.after(at)
        return seen

    @cached_property
    def sagas(self) -> dict[Action, set[Action]]:
        """For each start, itself and the actions of the saga that it opens."""
        return {
            action: {action} | self.reachable(action)
            for action in self.actions
            if action.kind == "start"
        }

    @cached_property
    def before(self) -> dict[Action, frozenset[Action]]:
        """For each action, those that have surely succeeded when it runs."""
        everything = frozenset(self.actions)
        before = {
            action: frozenset() if action.kind == "start" else everything for action in self.actions
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
        self, action: Action, before: dict[Action, frozenset[Action]]
    ) -> frozenset[Action]:
        needed: frozenset[Action] = frozenset()
        for ref in action.on:
            ways = [before[producer] | {producer} for producer in self.producers.get(ref.name, ())]
            if ways:
                needed |= frozenset.intersection(*ways)
        return needed

    def cycles(self) -> list[list[Action]]:
        """Groups of actions that follow from one another in a circle."""
        reach = {action: self.reachable(action) for action in self.actions}
        groups: list[list[Action]] = []
        for action in self.actions:
            if action in reach[action] and not any(action in group for group in groups):
                groups.append(
                    [
                        other
                        for other in self.actions
                        if other in reach[action] and action in reach[other]
                    ]
                )
        return groups


def _actions(contract: Contract) -> Iterator[Action]:
    spec = contract.participant
    for start in spec.starts:
        yield Action(
            kind="start", participant=spec.name, name=f"start:{start.event.name}", on=(), emits=(start.event,),
            rejects=(), place=start.place, compensation=start.compensation, nothing_to_undo=start.nothing_to_undo,
        )  # fmt: skip
    for step in spec.steps:
        yield Action(
            kind="step", participant=spec.name, name=step.name, on=(step.on,), emits=step.emits, rejects=step.rejects,
            place=step.place, compensation=step.compensation, nothing_to_undo=step.nothing_to_undo,
            exhausted=step.exhausted,
        )  # fmt: skip
    for join in spec.joins:
        yield Action(
            kind="join", participant=spec.name, name=join.name, on=join.on, emits=join.emits, rejects=join.rejects,
            place=join.place, completes=join.completes, compensation=join.compensation,
            nothing_to_undo=join.nothing_to_undo, exhausted=join.exhausted,
        )  # fmt: skip
