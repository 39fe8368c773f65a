"""`saga check`: the faults that a choreography has before it runs, each with its place in the source.

The rules are those of saga theory (Garcia-Molina & Salem 1987; Richardson's pivot) and of swarm protocols (Kuhn,
Melgratti, Tuosto 2023), asked of the graph of `saga.flow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final, Literal

from saga.choreography import EventRef, Place
from saga.contract import Contract
from saga.flow import Action, Flow

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One fault: which rule, what is wrong, what to do, and where."""

    rule: str
    severity: Severity
    message: str
    place: Place | None


def check(contracts: Sequence[Contract]) -> list[Finding]:
    """Every fault of the choreography that the contracts make together, in source order."""
    flow = Flow(contracts)
    findings = [finding for rule in RULES for finding in rule(flow)]
    return sorted(findings, key=lambda one: (one.severity, str(one.place), one.rule, one.message))


def _error(rule: str, message: str, place: Place | None) -> Finding:
    return Finding(rule, "error", message, place)


def _warning(rule: str, message: str, place: Place | None) -> Finding:
    return Finding(rule, "warning", message, place)


# --- events and who takes them


def _unheard_event(flow: Flow) -> Iterator[Finding]:
    """A produced event has a consumer; what a completing action says at the end may have none."""
    for action in flow.actions:
        for ref in action.emits:
            heard = ref.name in flow.consumers or ref.name in flow.subscribers
            if not heard and not action.completes:
                yield _error(
                    "unheard-event",
                    f"{action} emits {ref}, and nobody takes it: bind a step, a join or a subscriber to it, "
                    "or emit nothing",
                    action.place,
                )


def _unproduced_event(flow: Flow) -> Iterator[Finding]:
    """A consumed event has a producer."""
    rejections = {ref.name for action in flow.actions for ref in action.rejects}
    for action in flow.actions:
        for ref in action.on:
            if ref.name not in flow.producers:
                hint = (
                    "it is a rejection, which aborts the saga: undo in a compensation instead of reacting to it"
                    if ref.name in rejections
                    else "declare who emits it, or check its contract together with these"
                )
                yield _error(
                    "unproduced-event",
                    f"{action} takes {ref}, and nobody emits it: {hint}",
                    action.place,
                )


def _versions_do_not_meet(flow: Flow) -> Iterator[Finding]:
    """A producer's version is one that each consumer can read."""
    for producer in flow.actions:
        for ref in producer.emits:
            for consumer in flow.consumers.get(ref.name, ()):
                contract = _contract(flow, consumer)
                known = next(
                    (event for event in contract.events if event.event.name == ref.name), None
                )
                if known is not None and known.reads and ref.version not in known.reads:
                    yield _error(
                        "version",
                        f"{producer} emits {ref}; {consumer} reads versions {list(known.reads)} of it: "
                        "deploy the reader (or an upcaster) first",
                        consumer.place,
                    )


def _schemas_differ(flow: Flow) -> Iterator[Finding]:
    """Services that name one event type and version mean the same schema."""
    seen: dict[EventRef, tuple[Contract, dict[str, Any]]] = {}
    for contract in flow.contracts:
        for event in contract.events:
            first, schema = seen.setdefault(event.event, (contract, event.schema))
            if schema != event.schema:
                yield _error(
                    "schema",
                    f"{first.participant.name} and {contract.participant.name} disagree on {event.event}: "
                    f"{difference(schema, event.schema)}",
                    _place_of(contract),
                )


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What differs between two JSON Schemas, by property."""
    ours, theirs = one.get("properties", {}), other.get("properties", {})
    parts = [f"{name} only in the first" for name in ours.keys() - theirs.keys()]
    parts += [f"{name} only in the second" for name in theirs.keys() - ours.keys()]
    parts += [
        f"{name} is defined differently"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    if set(one.get("required", ())) != set(other.get("required", ())):
        parts.append("other fields are required")
    return ", ".join(sorted(parts)) or "their definitions differ"


def _decided_in_two_places(flow: Flow) -> Iterator[Finding]:
    """A type of event that leads on is emitted by one action of a saga: else nobody can tell where the saga stands."""
    for start, saga in flow.sagas.items():
        for name, producers in flow.producers.items():
            inside = [producer for producer in producers if producer in saga]
            if len(inside) > 1 and name in flow.consumers:
                yield _warning(
                    "two-producers",
                    f"in the saga of {start.emits[0].name}, {name} is emitted by {_listed(inside)}: "
                    "who takes it cannot tell which way the saga went",
                    inside[1].place,
                )


# --- undoing


def _no_compensation(flow: Flow) -> Iterator[Finding]:
    """What can be followed by an abort can be undone, or says that there is nothing to undo."""
    for saga in flow.sagas.values():
        ends = [action for action in saga if action.can_abort]
        decisions = {action for action in saga if action.completes}
        for action in sorted(saga, key=lambda one: one.place):
            if action.compensation is not None or action.nothing_to_undo is not None:
                continue
            decided = flow.before[action] | {action}
            if decided & decisions:
                continue
            danger = [end for end in ends if end not in decided]
            if danger:
                yield _error(
                    "no-compensation",
                    f"{action} may have to be undone (after {_listed(danger)} says no) and has no compensation: "
                    'declare one, or say nothing_to_undo="..."',
                    action.place,
                )


def _one_decision_point(flow: Flow) -> Iterator[Finding]:
    """Whatever can abort is before the decision, or on the participant that decides, where a row lock settles it."""
    for start, saga in flow.sagas.items():
        decisions = [action for action in saga if action.completes]
        if not decisions:
            yield _error(
                "no-decision",
                f"the saga of {start.emits[0].name} is never completed: give one join or step completes=True",
                start.place,
            )
        for decision, end in (
            (d, e) for d in decisions for e in saga if e.can_abort and e is not d
        ):
            if decision in flow.before[end]:
                yield _error(
                    "abort-after-decision",
                    f"{end} can reject after {decision} has completed the saga: what follows the decision may only "
                    "go forward",
                    end.place,
                )
            elif end not in flow.before[decision] and end.participant != decision.participant:
                yield _error(
                    "abort-beside-decision",
                    f"{end} can reject while {decision} completes the saga without waiting for it: let the join wait "
                    f"for {_listed(end.emits) or 'an event of it'}, or move the decision",
                    end.place,
                )


# --- ways through the graph


def _join_never_fires(flow: Flow) -> Iterator[Finding]:
    """All events of a join can come, in one saga, and not instead of each other."""
    for join in (action for action in flow.actions if action.kind == "join"):
        homes = [saga for saga in flow.sagas.values() if join in saga]
        missing = [
            ref for ref in join.on
            if ref.name in flow.producers and not any(set(flow.producers[ref.name]) & saga for saga in homes)
        ]  # fmt: skip
        if missing:
            yield _error(
                "join-never-fires",
                f"join {join} waits for {_listed(missing)}, which no action of its saga emits",
                join.place,
            )
        for one, other in combinations(join.on, 2):
            sources = {p for ref in (one, other) for p in flow.producers.get(ref.name, ())}
            if len(sources) == 1 and {one.name, other.name} <= {
                ref.name for ref in next(iter(sources)).emits
            }:
                yield _error(
                    "join-never-fires",
                    f"join {join} waits for both {one} and {other}, of which {next(iter(sources))} emits only one",
                    join.place,
                )


def _cycle(flow: Flow) -> Iterator[Finding]:
    """A circle of events ends somewhere."""
    for group in flow.cycles():
        leaves = any(follower not in group for action in group for follower in flow.after(action))
        ways_out = [a for a in group if a.can_abort or len(a.emits) > 1]
        if leaves and ways_out:
            yield _warning(
                "cycle",
                f"{_listed(group)} follow from one another in a circle; bound the rounds",
                group[0].place,
            )
        else:
            yield _error(
                "cycle",
                f"{_listed(group)} follow from one another in a circle that nothing leaves",
                group[0].place,
            )


def _unreachable(flow: Flow) -> Iterator[Finding]:
    """Every action belongs to a saga that someone starts."""
    inside = {action for saga in flow.sagas.values() for action in saga}
    for action in flow.actions:
        if action not in inside and all(ref.name in flow.producers for ref in action.on):
            yield _error(
                "unreachable",
                f"{action} belongs to no saga: no start leads to its events",
                action.place,
            )


def _fork_not_joined(flow: Flow) -> Iterator[Finding]:
    """A parallel branch is waited for, or the saga is completed while the branch is still under way."""
    for saga in flow.sagas.values():
        decisions = [action for action in saga if action.completes]
        for action in sorted(saga, key=lambda one: one.place):
            awaited = any(
                action is decision
                or action in flow.before[decision]
                or decision in flow.before[action]
                for decision in decisions
            )
            if decisions and not awaited and not action.can_abort:
                yield _warning(
                    "branch-not-joined",
                    f"{action} is under way beside {_listed(decisions)}, which does not wait for it",
                    action.place,
                )


def _contract(flow: Flow, action: Action) -> Contract:
    return next(one for one in flow.contracts if one.participant.name == action.participant)


def _place_of(contract: Contract) -> Place | None:
    spec = contract.participant
    places = [start.place for start in spec.starts]
    places += [step.place for step in spec.steps]
    places += [join.place for join in spec.joins]
    return min(places, default=None)


def _listed(items: Sequence[object]) -> str:
    return ", ".join(str(item) for item in items)


RULES: Final[tuple[Callable[[Flow], Iterator[Finding]], ...]] = (
    _unheard_event,
    _unproduced_event,
    _versions_do_not_meet,
    _schemas_differ,
    _decided_in_two_places,
    _no_compensation,
    _one_decision_point,
    _join_never_fires,
    _cycle,
    _unreachable,
    _fork_not_joined,
)
