"""What one participant remembers of its sagas, and the narrow port through which the runtime uses it.

The runtime does no I/O of its own: it asks a `Journal` inside a transaction that someone else begins
and ends. `saga.store` answers from PostgreSQL; a simulation answers from a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Protocol
from uuid import UUID

from outbox.envelope import Envelope
from outbox.events import EventType
from saga.context import Emission
from saga.errors import IllegalTransition


class SagaState(StrEnum):
    """Where a saga stands, as far as one participant knows."""

    RUNNING = "running"
    COMPLETED = "completed"
    """Decided: it goes forward from here, and no abort is heard any more."""
    COMPENSATING = "compensating"
    """Aborted, and some of this participant's steps are not undone yet."""
    COMPENSATED = "compensated"
    """Aborted, with nothing left of it here. Also the tombstone of a saga not heard of before."""

    @property
    def aborted(self) -> bool:
        return self in (SagaState.COMPENSATING, SagaState.COMPENSATED)


class StepState(StrEnum):
    """Where one run of a step stands."""

    DONE = "done"
    REJECTED = "rejected"
    """The step said no and left nothing behind."""
    SKIPPED = "skipped"
    """It never ran, because the saga had been aborted (or decided, for a completing join)."""
    STUCK = "stuck"
    """Its attempts are used up and it left nothing behind; a redrive runs it again."""
    COMPENSATING = "compensating"
    """Its compensation is due, as durable work of its own."""
    COMPENSATION_STUCK = "compensation_stuck"
    """Its compensation's attempts are used up; a redrive runs it again."""
    COMPENSATED = "compensated"
    CALLING = "calling"
    """An external step is about to call, calls, or has called: nobody knows until its result is
    written down."""
    UNRESOLVED = "unresolved"
    """Nobody could find out, in all attempts, whether the call took effect: a person has to say."""
    HAPPENED = "happened"
    """A person has said that it took effect; its result is about to be written down."""
    NOT_HAPPENED = "not_happened"
    """It was found not to have taken effect. Should it after all, it is undone."""

    @property
    def is_uncertain(self) -> bool:
        """Whether there may be something to undo that nothing is known of yet."""
        return self in (StepState.CALLING, StepState.UNRESOLVED, StepState.HAPPENED)

    @property
    def owes_compensation(self) -> bool:
        return self in (StepState.COMPENSATING, StepState.COMPENSATION_STUCK)

    @property
    def has_effects(self) -> bool:
        """Whether there is, or may be, something of it that an abort would have undone."""
        return self is StepState.DONE or self.owes_compensation or self.is_uncertain

    @property
    def waits_for_a_person(self) -> bool:
        return self in (StepState.STUCK, StepState.UNRESOLVED, StepState.COMPENSATION_STUCK)


SAGA_TRANSITIONS: Final[Mapping[SagaState, frozenset[SagaState]]] = MappingProxyType(
    {
        SagaState.RUNNING: frozenset(
            {SagaState.COMPLETED, SagaState.COMPENSATING, SagaState.COMPENSATED}
        ),
        SagaState.COMPENSATING: frozenset({SagaState.COMPENSATED}),
        SagaState.COMPLETED: frozenset(),
        SagaState.COMPENSATED: frozenset(),
    }
)
_OUTCOMES: Final = frozenset(
    {
        StepState.DONE, StepState.REJECTED, StepState.SKIPPED, StepState.STUCK, StepState.CALLING,
    }
)  # fmt: skip
_AFTER_A_CALL: Final = frozenset(
    {
        StepState.DONE, StepState.REJECTED, StepState.COMPENSATING, StepState.NOT_HAPPENED,
        StepState.UNRESOLVED,
    }
)  # fmt: skip
STEP_TRANSITIONS: Final[Mapping[StepState | None, frozenset[StepState]]] = MappingProxyType(
    {
        None: _OUTCOMES,
        StepState.STUCK: _OUTCOMES,
        StepState.CALLING: _AFTER_A_CALL,
        StepState.UNRESOLVED: _AFTER_A_CALL | {StepState.HAPPENED},
        StepState.HAPPENED: _AFTER_A_CALL,
        StepState.NOT_HAPPENED: frozenset(
            {
                StepState.CALLING,
                StepState.DONE,
                StepState.REJECTED,
                StepState.COMPENSATING,
                StepState.UNRESOLVED,
            }
        ),
        StepState.DONE: frozenset({StepState.COMPENSATING, StepState.COMPENSATED}),
        StepState.COMPENSATING: frozenset({StepState.COMPENSATED, StepState.COMPENSATION_STUCK}),
        StepState.COMPENSATION_STUCK: frozenset(
            {StepState.COMPENSATED, StepState.COMPENSATION_STUCK}
        ),
        StepState.REJECTED: frozenset(),
        StepState.SKIPPED: frozenset(),
        StepState.COMPENSATED: frozenset(),
    }
)


def check_saga_move(saga_id: UUID, before: SagaState, after: SagaState) -> None:
    """Raise `IllegalTransition` unless a saga may go from *before* to *after*."""
    if after not in SAGA_TRANSITIONS[before]:
        raise IllegalTransition(f"saga {saga_id} cannot go from {before} to {after}")


def check_step_move(run: RunKey, before: StepState | None, after: StepState) -> None:
    """Raise `IllegalTransition` unless a step's run may go from *before* to *after*."""
    if after not in STEP_TRANSITIONS[before]:
        raise IllegalTransition(f"{run} cannot go from {before or 'nothing'} to {after}")


@dataclass(frozen=True, slots=True)
class RunKey:
    """One run of one step: a step runs once for each event that triggers it."""

    saga_id: UUID
    step: str
    trigger_id: UUID
    """Id of the triggering event; of the saga, for a join."""

    def __str__(self) -> str:
        return f"step {self.step} (trigger {self.trigger_id}) of saga {self.saga_id}"


@dataclass(frozen=True, slots=True)
class SagaRow:
    """A saga's row, locked until the transaction ends."""

    saga_id: UUID
    state: SagaState
    stuck: bool = False
    reason: str | None = None
    new: bool = False
    """Whether this very call wrote it: nothing else of this saga can be in the journal then."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One run of a step as the journal has it, without the bodies."""

    key: RunKey
    state: StepState
    reason: str | None = None
    published: tuple[Emission, ...] = ()
    causes: frozenset[UUID] = frozenset()
    """Ids of the events that it answers; empty for a start."""


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """A run whose row is locked, with the exact envelopes that its compensation needs."""

    key: RunKey
    state: StepState
    trigger: bytes
    emitted: bytes | None


@dataclass(frozen=True, slots=True)
class PeersOfSaga:
    """The other participants, for one saga."""

    heard: Mapping[str, frozenset[UUID]]
    """What each that has sealed the saga may not have undone yet."""
    silent: Mapping[str, frozenset[str]]
    """The event types that each of the others known answers."""


class Journal(Protocol):
    """The port: one participant's journal, outbox and pending work, in one open transaction.

    A model that replaces it must do as PostgreSQL does at READ COMMITTED: `open` and `lock` wait
    for an uncommitted row of the same saga, `lock` and `claim` wait for a row that is locked, and
    each call sees what was committed before it began.
    """

    @property
    def session(self) -> Any:
        """What the user's functions get to write through."""

    def open(self, start: RunKey, definition: str, trigger: bytes) -> bool:
        """Write a new saga with its start as done; False, writing nothing, if there is one."""

    def lock(self, saga_id: UUID) -> SagaRow:
        """Lock the saga's row, writing it as running where there is none."""

    def lock_known(self, saga_id: UUID) -> SagaRow | None:
        """Lock the saga's row; None where there is none."""

    def move(self, saga: SagaRow, state: SagaState, *, stuck: bool, reason: str | None) -> SagaRow:
        """Write a locked saga's state, or only its flag and reason where the state stays."""

    def find(self, key: RunKey) -> StepState | None:
        """The state of a run; None where the journal has no such run."""

    def known_as(self, key: RunKey) -> RunKey:
        """The key under which `find` has found the run, which may bear a name that its step had."""

    def record(
        self,
        key: RunKey,
        before: StepState | None,
        after: StepState,
        *,
        trigger: bytes,
        emitted: bytes | None = None,
        published: Sequence[Emission] = (),
        reason: str | None = None,
    ) -> None:
        """Write the outcome of a run that did not stand in the journal, or stood there as stuck."""

    def advance(
        self, key: RunKey, before: StepState, after: StepState, *, reason: str | None = None
    ) -> None:
        """Move a recorded run on. Raises `IllegalTransition` if it does not stand at *before*."""

    def verdict(self, key: RunKey) -> str | None:
        """The event, as JSON, that a person gave who said that a call took effect."""

    def runs(self, saga_id: UUID) -> list[StepRow]:
        """All runs of a saga, oldest first."""

    def claim(self, key: RunKey) -> ClaimedRun | None:
        """Lock one run's row and read it."""

    def arrive(self, saga_id: UUID, join: str, envelope: Envelope) -> None:
        """Keep an event for a join; the first of its type stays."""

    def arrivals(self, saga_id: UUID, join: str) -> dict[str, bytes]:
        """The events that have come for a join: their exact envelopes by event type."""

    def adopt(self, child_id: UUID, parent: RunKey) -> None:
        """Note that a run has opened another saga and waits for its end."""

    def parent(self, child_id: UUID) -> RunKey | None:
        """The run that has opened a saga; None where none has."""

    def know(self, peer: str, takes: Collection[str], since: UUID) -> bool:
        """Note the event types that a peer's steps and joins answer; whether it was unknown.

        *since* is the UUIDv7 of the event that says so: an older one changes nothing.
        """

    def forget(self, peer: str) -> bool:
        """Wait for a peer no longer, in no saga; whether it was known."""

    def peers(self) -> Mapping[str, frozenset[str]]:
        """The participants known, this one among them, and the event types that they answer."""

    def hear(self, saga_id: UUID, peer: str, pending: Collection[UUID]) -> None:
        """Note what a peer has said of a locked saga: what it answered and has not undone yet."""

    def peers_of(self, saga_id: UUID) -> PeersOfSaga:
        """The other participants, as far as a saga is known to have come there."""

    def append(self, envelope: Envelope, event_type: EventType) -> None:
        """Publish an event with this transaction."""

    def schedule(
        self,
        handler: str,
        envelope: Envelope,
        due_at: datetime | None = None,
        *,
        delay: timedelta = timedelta(0),
    ) -> None:
        """Owe one handler of this participant a delivery, due *delay* after *due_at* (None: now)."""

    def savepoint(self) -> AbstractContextManager[Any]:
        """A part of the transaction that an exception takes back alone."""

    def flush(self) -> None:
        """Send what a user's function left in the session, so that its errors show here."""
