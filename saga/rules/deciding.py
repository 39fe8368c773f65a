"""The decision: each way through a saga has one, and nothing can abort behind its back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final

from saga.findings import Finding, error, listed, warning
from saga.flow import Action, Flow, Saga, Way


def no_decision(flow: Flow) -> Iterator[Finding]:
    """A saga can be completed."""
    for saga in flow.sagas:
        if not any(action.completes for action in saga.actions):
            yield error(
                "no-decision",
                f"{saga} is never completed: give the join that ends it completes=True "
                "(a join may wait for one event)",
                saga.start.place,
            )


def undecided_way(flow: Flow) -> Iterator[Finding]:
    """Where an action has a choice, each answer leads to a decision."""
    for saga in flow.sagas:
        decided = [way for way in saga.ways if way.decisions]
        for way in saga.ways if decided else ():
            if not way.decisions and not _goes_round(way):
                yield _undecided(saga, way)


def _undecided(saga: Saga, way: Way) -> Finding:
    said = listed(f"{action} answers with {name}" for action, name in way.chosen.items())
    place = max(way.chosen, key=lambda action: len(way.before[action])).place
    may_reject = [
        end for end in way.aborters
        if end.rejects and any(action in way.before[end] for action in way.chosen)
    ]  # fmt: skip
    if may_reject:
        return warning(
            "undecided-way",
            f"when {said}, {saga} ends only if {listed(may_reject)} rejects, which it need not: "
            "let it go on to a decision otherwise",
            place,
        )
    return error("undecided-way", f"when {said}, nothing completes {saga} or aborts it", place)


def _goes_round(way: Way) -> bool:
    """Circles have a rule of their own."""
    return any(action in way.follows(action) for action in way.actions)


def two_decisions(flow: Flow) -> Iterator[Finding]:
    """One participant decides. (On one participant the saga's row lock lets only one decide.)"""
    for saga in flow.sagas:
        for way in saga.ways:
            for first, other in pairwise(way.decisions):
                if first.participant != other.participant:
                    yield error(
                        "two-decisions",
                        f"{first} and {other} both complete {saga}: one of them must only go on",
                        other.place,
                    )


def abort_after_decision(flow: Flow) -> Iterator[Finding]:
    """After the decision the saga can only go forward."""
    for saga, way, decision, end in _decisions_and_aborters(flow):
        if end in way.follows(decision) and end not in way.before[decision]:
            yield error(
                "abort-after-decision",
                f"{end} can abort after {decision} has completed {saga}: what follows the "
                "decision may only go forward",
                end.place,
            )


def abort_beside_decision(flow: Flow) -> Iterator[Finding]:
    """Whatever can reject comes before the decision. (What only gives up may be on the participant
    that decides: there the saga's row lock lets one of the two win, and nobody has said no.)"""
    for saga, way, decision, end in _decisions_and_aborters(flow):
        beside = end not in way.before[decision] and end not in way.follows(decision)
        here = end.participant == decision.participant
        if not beside or (here and not end.rejects):
            continue
        said = listed(way.answers(end)) or "an event of it (it emits none)"
        too_late = " (a rejection that comes second is stuck)" if here else ""
        yield error(
            "abort-beside-decision",
            f"{end} can abort while {decision} completes {saga} without waiting for it{too_late}: "
            f"let the join wait for {said}",
            end.place,
        )


def deadline_far_from_decision(flow: Flow) -> Iterator[Finding]:
    """A deadline races with the decision on one row lock, so it is where that is."""
    for saga in flow.sagas:
        deciders = {action.participant for action in saga.actions if action.completes}
        for deadline in saga.deadlines if deciders else ():
            if deadline.participant not in deciders:
                yield error(
                    "deadline-far-from-decision",
                    f"{deadline.participant}.{deadline.name} can abort {saga} while "
                    f"{listed(sorted(deciders))} completes it: declare the deadline there",
                    deadline.place,
                )


def no_deadline(flow: Flow) -> Iterator[Finding]:
    """A decision that waits for others waits for so long and no longer, or says why it may."""
    for saga in flow.sagas:
        waiting = [
            decision
            for way in saga.ways
            for decision in way.decisions
            if any(one.participant != decision.participant for one in way.before[decision])
            and decision.no_deadline is None
        ]
        if waiting and not saga.deadlines:
            yield warning(
                "no-deadline",
                f"{waiting[0]} waits for others, and {saga} has no deadline: one that does not "
                f"answer leaves it open for as long; declare @{waiting[0].participant}.deadline, or "
                'say no_deadline="why"',
                waiting[0].place,
            )


def retriable_before_decision(flow: Flow) -> Iterator[Finding]:
    """What can only succeed and is never undone comes after the decision."""
    for saga in flow.sagas:
        for action in saga.actions:
            ways = [way for way in saga.ways if action in way.actions]
            after = all(any(one in way.before[action] for one in way.decisions) for way in ways)
            if action.retriable and not after:
                yield error(
                    "retriable-before-decision",
                    f"{action} is retriable, so it is never undone, and can run before {saga} is "
                    "decided: let it follow the pivot, or give it a compensation instead",
                    action.place,
                )


def _decisions_and_aborters(flow: Flow) -> Iterator[tuple[Saga, Way, Action, Action]]:
    for saga in flow.sagas:
        for way in saga.ways:
            for decision in way.decisions:
                for end in way.aborters:
                    if end is not decision:
                        yield saga, way, decision, end


RULES: Final[tuple[Callable[[Flow], Iterator[Finding]], ...]] = (
    no_decision,
    undecided_way,
    two_decisions,
    abort_after_decision,
    abort_beside_decision,
    deadline_far_from_decision,
    no_deadline,
    retriable_before_decision,
)
