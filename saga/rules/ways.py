"""Ways through the graph: every action can be reached, every join can fire, every circle ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from saga.findings import Finding, error, listed, warning
from saga.flow import Action, Flow, Saga


def unreachable(flow: Flow) -> Iterator[Finding]:
    """Every action belongs to a saga that someone starts."""
    inside = {action for saga in flow.sagas for action in saga.actions}
    for action in flow.actions:
        if action not in inside and all(ref.name in flow.producers for ref in action.on):
            yield error(
                "unreachable",
                f"{action} belongs to no saga: no start leads to its events",
                action.place,
            )


def join_never_fires(flow: Flow) -> Iterator[Finding]:
    """All events of a join can come, in one saga, and not instead of each other."""
    for join in (action for action in flow.actions if action.kind == "join"):
        homes = [saga for saga in flow.sagas if join in saga.actions]
        fires = any(join in way.actions for saga in homes for way in saga.ways)
        produced = all(ref.name in flow.producers for ref in join.on)
        if homes and produced and not fires:
            yield error(
                "join-never-fires",
                f"join {join} waits for {listed(ref.name for ref in join.on)}: "
                f"{_why_not(join, homes[0])}",
                join.place,
            )


def _why_not(join: Action, saga: Saga) -> str:
    elsewhere = [
        ref.name for ref in join.on
        if not any(ref.name in action.answers for action in saga.actions)
    ]  # fmt: skip
    if elsewhere:
        return f"no action of {saga} emits {listed(elsewhere)}"
    if join not in saga.all_at_once.actions:
        running = saga.all_at_once.actions
        late = [ref.name for ref in join.on if not saga.all_at_once.producers(ref.name)]
        waiting = listed(action for action in saga.actions if action not in running)
        return f"{listed(late)} can only come after it, or after what waits as well ({waiting})"
    return f"they come instead of each other ({_choices(join, saga)})"


def _choices(join: Action, saga: Saga) -> str:
    upstream = saga.all_at_once.before[join]
    return listed(
        f"{action} answers with one of {listed(action.answers)}"
        for action in saga.actions
        if action in upstream and len(action.answers) > 1
    )


def circle(flow: Flow) -> Iterator[Finding]:
    """A circle of events ends somewhere."""
    for unsorted in flow.cycles():
        group = sorted(unsorted, key=lambda action: action.place)
        if any(action.can_abort or _answer_that_leaves(flow, action, group) for action in group):
            yield warning(
                "cycle",
                f"{listed(group)} follow from one another in a circle: bound the rounds",
                group[0].place,
            )
        else:
            yield error(
                "cycle",
                f"{listed(group)} follow from one another in a circle that nothing leaves",
                group[0].place,
            )


def _answer_that_leaves(flow: Flow, action: Action, group: list[Action]) -> bool:
    return any(
        not any(taker in group for taker in flow.consumers.get(name, ()))
        for name in action.answers
    ) and len(action.answers) > 1  # fmt: skip


def branch_not_joined(flow: Flow) -> Iterator[Finding]:
    """What runs beside the decision is under way, or not even begun, when the saga is completed."""
    for saga in flow.sagas:
        for way in saga.ways:
            for action in way.actions:
                awaited = any(
                    action is decision
                    or action in way.before[decision]
                    or decision in way.before[action]
                    for decision in way.decisions
                )
                if way.decisions and not awaited and not action.can_abort:
                    yield warning(
                        "branch-not-joined",
                        f"{action} is under way beside {listed(way.decisions)}, which completes "
                        f"{saga} without waiting for it",
                        action.place,
                    )


RULES: Final[tuple[Callable[[Flow], Iterator[Finding]], ...]] = (
    unreachable,
    join_never_fires,
    circle,
    branch_not_joined,
)
