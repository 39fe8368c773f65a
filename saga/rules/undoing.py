"""Undoing: what can be followed by an abort can be taken back, or says why it need not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from saga.findings import Finding, error, listed, warning
from saga.flow import Action, Flow, Saga, Way

_REMEDY: Final = 'declare one, or say nothing_to_undo="why"'


def no_compensation(flow: Flow) -> Iterator[Finding]:
    """A step that is done before something else aborts the saga has a compensation."""
    for saga in flow.sagas:
        for action in saga.actions:
            if not action.can_be_undone and not action.retriable:
                yield from _without_compensation(saga, action)


def _without_compensation(saga: Saga, action: Action) -> Iterator[Finding]:
    open_ways = [way for way in saga.ways if action in way.actions and not _decided(way, action)]
    dangers: dict[object, None] = dict.fromkeys(
        end for way in open_ways for end in _dangers(way, action)
    )
    if open_ways:
        late = (f"the deadline {one.participant}.{one.name}" for one in saga.deadlines)
        dangers.update(dict.fromkeys(late))
    if dangers:
        yield error(
            "no-compensation",
            f"{action} may have to be undone (when {listed(dangers)} says no) and has no "
            f"compensation: {_REMEDY}",
            action.place,
        )
    elif open_ways and any(action.completes for action in saga.actions):
        yield warning(
            "no-compensation",
            f"{action} is done before {saga} is decided and has no compensation; nothing declared "
            f"aborts it then, but a person may: {_REMEDY}",
            action.place,
        )


def _decided(way: Way, action: Action) -> bool:
    return action.completes or any(decision in way.before[action] for decision in way.decisions)


def _dangers(way: Way, action: Action) -> list[Action]:
    return [
        end for end in way.aborters
        if end is not action and end not in way.before[action]
        and not any(decision in way.before[end] for decision in way.decisions)
    ]  # fmt: skip


def uncertain_call(flow: Flow) -> Iterator[Finding]:
    """What came of a call outside that was cut off can be found out without a person."""
    for action in flow.actions:
        if action.external and not action.resolves:
            yield warning(
                "uncertain-call",
                f"{action} acts outside and has no resolve hook: a call whose answer is lost waits "
                "for a person (saga resolve), and its saga with it",
                action.place,
            )


RULES: Final[tuple[Callable[[Flow], Iterator[Finding]], ...]] = (no_compensation, uncertain_call)
