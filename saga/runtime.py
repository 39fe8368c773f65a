"""What every operation of one participant works with: its journal, its events and its declarations.

The runtime does no I/O of its own. It runs inside the transaction of a delivery (or, for a start,
of the caller), and reaches the database only through `Journal`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from outbox.envelope import Envelope, decode
from outbox.events import Registry
from outbox.service import Delivery
from outbox.statements import storable
from outbox.writing import encode
from saga.context import SAGA_ID, CurrentSaga, working_for
from saga.declaration import Deadline, Start
from saga.errors import OutsideSaga
from saga.journal import Journal, RunKey, SagaRow, StepRow
from saga.reaction import Reaction

log: Final = logging.getLogger("saga")

_MAX_REASON: Final = 1_000


@dataclass(frozen=True)
class Runtime:
    """One participant, as its operations see it."""

    participant: str
    registry: Registry
    reactions: Mapping[str, Reaction[..., Any]]
    """Its declarations by name, also those made after this object."""
    open_journal: Callable[[Any], Journal]
    """Its journal in the transaction of the session given."""
    unwinds_eagerly: bool = False
    """Whether it undoes its steps at once, and not in reverse causal order."""

    @property
    def answers(self) -> frozenset[str]:
        """The event types that its steps and joins answer."""
        reactions = [
            one for one in self.reactions.values() if not isinstance(one, Start | Deadline)
        ]
        return frozenset(event_type.name for one in reactions for event_type in one.on)

    def handler(self, reaction: str) -> str:
        """Name of the handler that runs a step, a join or a deadline, or takes a control event."""
        return f"{self.participant}.{reaction}"

    def delayed_handler(self, step: str) -> str:
        """Name of the handler that runs a delayed step when its time has come."""
        return f"{self.participant}.{step}.delayed"

    def compensation_handler(self, step: str) -> str:
        """Name of the handler that takes the compensations of a step."""
        return f"{self.participant}.{step}.compensation"

    def working(
        self, key: RunKey, *, compensating: bool = False
    ) -> AbstractContextManager[CurrentSaga]:
        """Make a run the current one inside the block, for the user's function that it calls."""
        return working_for(
            CurrentSaga(key.saga_id, self.participant, key.step, key.trigger_id, compensating)
        )

    def envelope(self, event: object, saga_id: UUID, caused_by: Envelope | None) -> Envelope:
        """Make the envelope of an event that belongs to the saga."""
        return encode(
            self.registry.of(event),
            event,
            source=self.participant,
            caused_by=caused_by,
            correlation_id=str(saga_id),
            extensions={SAGA_ID: str(saga_id)},
        )

    def free_envelope(self, event: object, caused_by: Envelope | None) -> Envelope:
        """Make the envelope of an event that belongs to no saga."""
        event_type = self.registry.of(event)
        return encode(event_type, event, source=self.participant, caused_by=caused_by)

    def publish(
        self, journal: Journal, event: object, saga_id: UUID, caused_by: Envelope | None
    ) -> Envelope:
        """Publish an event of the saga with the journal's transaction."""
        envelope = self.envelope(event, saga_id, caused_by)
        journal.append(envelope, self.registry.of(event))
        return envelope

    def arguments(
        self, reaction: Reaction[..., Any], arrived: Mapping[str, bytes]
    ) -> tuple[object, ...]:
        """The event of each type that a join waits for; None for what has not come."""
        names = [event_type.name for event_type in reaction.on]
        return tuple(self.read(arrived[name]) if name in arrived else None for name in names)

    def set_deadlines(
        self, journal: Journal, reaction: Reaction[..., Any], event: object, envelope: Envelope
    ) -> None:
        """Owe the deadlines that count from *reaction*, whose event this is (see `saga.deadline`).

        Raises `InvalidDeadline`.
        """
        for deadline in reaction.deadlines:
            due_at = deadline.due_at(event)
            journal.schedule(self.handler(deadline.name), envelope, due_at, delay=deadline.within)

    def read(self, body: bytes) -> Any:
        """The payload of a journaled envelope, in the class and version that the code knows now."""
        _, event = self.read_with_envelope(body)
        return event

    def read_with_envelope(self, body: bytes) -> tuple[Envelope, Any]:
        """A journaled envelope, and its payload as `read` gives it."""
        envelope = decode(body)
        return envelope, self.registry.read(envelope.type, envelope.version, envelope.data)


def saga_id_of(delivery: Delivery) -> UUID:
    """The saga that a delivery belongs to. Raises `OutsideSaga`."""
    saga_id = known_saga_id_of(delivery)
    if saga_id is None:
        raise OutsideSaga(
            f"event {delivery.envelope.type} {delivery.envelope.id} belongs to no saga, and "
            f"{delivery.handler} is part of one: open it with participant.start(session, event), "
            "or take the event with @participant.on(...)"
        )
    return saga_id


def known_saga_id_of(delivery: Delivery) -> UUID | None:
    """The saga that a delivery belongs to; None where it names none, or names it unreadably."""
    try:
        return UUID(str(delivery.envelope.extensions.get(SAGA_ID)))
    except ValueError:
        return None


def reset_stuck(journal: Journal, saga: SagaRow, runs: list[StepRow] | None = None) -> SagaRow:
    """Say of a locked saga that it is stuck exactly if one of its runs is."""
    runs = journal.runs(saga.saga_id) if runs is None else runs
    stuck = any(run.state.waits_for_a_person for run in runs)
    if stuck == saga.stuck:
        return saga
    return journal.move(saga, saga.state, stuck=stuck, reason=saga.reason)


def described(error: BaseException) -> str:
    """An exception in one line that PostgreSQL can store."""
    return storable(f"{type(error).__name__}: {error}", _MAX_REASON)


def shortened(reason: str) -> str:
    """A reason given by the user's code, as PostgreSQL can store it."""
    return storable(reason, _MAX_REASON)
