"""The runtime's own events: how participants tell each other that a saga was aborted or completed.

They are ordinary events: published through the outbox in the transaction that decides, carried by
the same bus, received once through the same inbox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from outbox.events import EventType, Registry


@dataclass(frozen=True)
class SagaAborted:
    """The saga will not complete: whoever acted in it undoes it, whoever has not acted never will."""

    saga_id: UUID
    participant: str
    step: str
    reason: str
    rejection_id: UUID | None = None
    """The event in which the step says no in the words of its own business."""


@dataclass(frozen=True)
class SagaCompleted:
    """The saga is decided: it goes forward from here."""

    saga_id: UUID
    participant: str
    step: str


@dataclass(frozen=True)
class OwedCompensation:
    """A run of a step that is not undone yet."""

    step: str
    trigger_id: UUID
    causes: tuple[UUID, ...] = ()
    """Ids of the events that the run answered."""


@dataclass(frozen=True)
class SagaUndone:
    """What one participant still has to undo after an abort; nothing more, when *pending* is empty.

    Only a participant that has sealed the saga (no step of it will run here any more) says this, so
    *pending* only ever shrinks: a run that is missing from any one of these events is undone or
    never was, in whatever order they arrive.
    """

    saga_id: UUID
    participant: str
    pending: tuple[OwedCompensation, ...] = ()
    reason: str = ""
    """Why the saga was aborted."""


@dataclass(frozen=True)
class SagaStuck:
    """A step or a compensation has used up its attempts: a person has to look at this saga."""

    saga_id: UUID
    participant: str
    step: str
    error: str
    """Class name of the last error; its text stays in the participant's own database."""


@dataclass(frozen=True)
class CompensationDue:
    """Work that a participant owes itself: undo one run of one step. Never leaves its own queue."""

    saga_id: UUID
    step: str
    trigger_id: UUID


@dataclass(frozen=True)
class ParticipantIntroduced:
    """Who takes part in sagas, and which event types its steps and joins answer."""

    participant: str
    takes: tuple[str, ...]


@dataclass(frozen=True)
class IntroductionDue:
    """Work that a participant owes itself: introduce itself. Never leaves its own queue."""

    participant: str


ABORTED: Final = EventType("saga.aborted", 1, SagaAborted, key="saga_id")
COMPLETED: Final = EventType("saga.completed", 1, SagaCompleted, key="saga_id")
UNDONE: Final = EventType("saga.undone", 1, SagaUndone, key="saga_id")
STUCK: Final = EventType("saga.stuck", 1, SagaStuck, key="saga_id")
COMPENSATION_DUE: Final = EventType("saga.compensation_due", 1, CompensationDue, key="saga_id")
INTRODUCED: Final = EventType("saga.introduced", 1, ParticipantIntroduced, key="participant")
INTRODUCTION_DUE: Final = EventType("saga.introduction_due", 1, IntroductionDue, key="participant")

CONTROL_EVENTS: Final = (
    ABORTED,
    COMPLETED,
    UNDONE,
    STUCK,
    COMPENSATION_DUE,
    INTRODUCED,
    INTRODUCTION_DUE,
)


def register_control_events(registry: Registry) -> None:
    """Make *registry* know the control events; doing it again changes nothing."""
    for event_type in CONTROL_EVENTS:
        registry.add(event_type)
