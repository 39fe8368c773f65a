"""What a participant has declared, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from outbox.events import EventType
from saga.choreography import (
    DeadlineSpec,
    EventRef,
    JoinSpec,
    ParticipantSpec,
    StartSpec,
    StepSpec,
)
from saga.declaration import ChildSaga, Deadline, Join, Start, Step
from saga.reaction import Reaction


def spec_of(name: str, reactions: Iterable[Reaction[..., Any]]) -> ParticipantSpec:
    """One participant's part in the choreography."""
    declared = list(reactions)
    return ParticipantSpec(
        name=name,
        starts=tuple(_start(one) for one in declared if isinstance(one, Start)),
        steps=tuple(_step(one) for one in declared if isinstance(one, Step)),
        joins=tuple(_join(one) for one in declared if isinstance(one, Join)),
        deadlines=tuple(
            _deadline(deadline, after.name) for after in declared for deadline in after.deadlines
        ),
    )


def _refs(types: tuple[EventType, ...]) -> tuple[EventRef, ...]:
    return tuple(EventRef.to(event_type) for event_type in types)


def _start(one: Start) -> StartSpec:
    (event,) = _refs(one.on)
    return StartSpec(one.owner.participant, event, one.place, one.undo_place, one.nothing_to_undo)


def _step(one: Step[..., Any]) -> StepSpec:
    (on,) = _refs(one.on)
    return StepSpec(
        one.owner.participant, one.name, on, _refs(one.emits), _refs(one.rejects), one.place,
        one.undo_place, one.nothing_to_undo, one.exhausted, one.was, one.is_external,
        one.resolver is not None, pivot=one.completes, retriable=one.retriable,
        opens=EventRef.to(one.opens) if isinstance(one, ChildSaga) else None,
        delay_seconds=None if one.delay is None else one.delay.total_seconds(),
        no_deadline=one.no_deadline,
    )  # fmt: skip


def _join(one: Join[..., Any]) -> JoinSpec:
    return JoinSpec(
        one.owner.participant, one.name, _refs(one.on), _refs(one.emits), _refs(one.rejects),
        one.completes, one.place, one.undo_place, one.nothing_to_undo, one.exhausted, one.was,
        needs=None if one.needs == len(one.on) else one.needs, no_deadline=one.no_deadline,
    )  # fmt: skip


def _deadline(one: Deadline[..., Any], after: str) -> DeadlineSpec:
    (on,) = _refs(one.on)
    return DeadlineSpec(
        one.owner.participant, one.name, on, after,
        one.within.total_seconds() if one.at is None else None, _refs(one.rejects), one.place,
    )  # fmt: skip
