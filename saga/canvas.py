"""`saga canvas`: the choreography as a table that people review.

It is Richardson's choreography-based saga canvas (Microservices Patterns, 2nd edition, chapter 10)
with a column for compensations. It is made from the declarations, so it cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Final

from saga.choreography import DeadlineSpec, EventRef
from saga.flow import Action, Flow

COLUMNS: Final = ("step", "participant", "trigger", "emits", "rejects", "compensation")


def canvas(flow: Flow) -> list[tuple[str, ...]]:
    """One row for each action in the order of the flow, then the deadlines; the columns are `COLUMNS`."""
    return [*_actions(flow), *(_deadline(one) for one in flow.deadlines)]


def _actions(flow: Flow) -> list[tuple[str, ...]]:
    return [
        (
            title(action),
            action.participant,
            _trigger(action),
            _names(action.emits, " or ") or "-",
            _names(action.rejects, " or ") or "-",
            _compensation(action),
        )
        for action in in_flow_order(flow)
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The canvas as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def in_flow_order(flow: Flow) -> list[Action]:
    """The actions: saga by saga, each after what it waits for; what belongs to no saga comes last."""
    ordered: dict[Action, None] = {}
    for saga in flow.sagas:
        before = saga.all_at_once.before
        runs = sorted(
            saga.all_at_once.actions,
            key=lambda action: (len(before[action]), action.participant, action.place),
        )
        ordered.update(dict.fromkeys(runs))
    ordered.update(dict.fromkeys(flow.actions))
    return list(ordered)


def title(action: Action) -> str:
    """What an action is called for people."""
    name = action.name.removeprefix("start:")
    if action.completes and action.kind == "step":
        return f"{name} (pivot)"
    if action.completes:
        return f"{name} (join, completes)"
    if action.external:
        return f"{name} (external)"
    return f"{name} (join)" if action.kind == "join" else name


def _trigger(action: Action) -> str:
    if action.enough == len(action.on):
        return _names(action.on, " and ") or "(starts the saga)"
    if action.enough == 1:
        return f"any of {_names(action.on, ', ')}"
    return f"{action.enough} of {_names(action.on, ', ')}"


def _deadline(one: DeadlineSpec) -> tuple[str, ...]:
    after = one.after.removeprefix("start:")
    when = f"when {one.on.name} says"
    if one.within_seconds is not None:
        when = f"{timedelta(seconds=one.within_seconds)} after {after}"
    rejects = _names(one.rejects, " or ")
    return (f"{one.name} (deadline)", one.participant, when, "-", rejects, "-")


def _names(refs: Iterable[EventRef], between: str) -> str:
    return between.join(dict.fromkeys(ref.name for ref in refs))


def _compensation(action: Action) -> str:
    if action.compensation is not None:
        return "yes"
    return f"none: {action.nothing_to_undo}" if action.nothing_to_undo is not None else "-"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())
