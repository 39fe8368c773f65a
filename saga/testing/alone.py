"""One participant on its own database, without a broker and without the others: the test plays them.

    stock = Alone(inventory, engine)
    saga_id = stock.hear(OrderCreated(...))
    assert stock.published == [StockReserved(...)]
    stock.abort(saga_id)
    assert stock.state(saga_id) == "compensated"

Receiving, inbox, journal and outbox are the real ones; every event is handled in a transaction of
its own, as by a worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import pending
from outbox.envelope import decode
from outbox.events import EventType
from outbox.ids import new_id
from outbox.receive import ReceiveSettings
from outbox.service import Service
from outbox.statements import statement
from outbox.work import Outcome
from outbox.writing import encode
from saga.context import SAGA_ID
from saga.control import ABORTED, COMPLETED, CONTROL_EVENTS, SagaAborted, SagaCompleted
from saga.testing.choreography import Choreography, Message, soonest

_NOT_HANDLED = frozenset({Outcome.RETRY, Outcome.PARKED, Outcome.QUARANTINED, Outcome.BUSY})
_PUBLISHED = """
SELECT position, body FROM {schema}.outbox_event WHERE position > :end ORDER BY position
"""
_STATE = "SELECT state FROM {schema}.saga WHERE saga_id = :saga_id AND participant = :participant"
_OTHERS = "test"
"""Who says what the test says."""


class Fresh(Choreography):
    """A choreography that leaves alone what earlier tests on the same database left to be done."""

    def __init__(
        self, services: Mapping[Service, Engine], *, settings: ReceiveSettings | None = None
    ) -> None:
        super().__init__(services, settings=settings)
        self._left = {
            (owed.service, owed.handler, owed.event_id)
            for engine, schema in self._logs()
            for owed in _owed(engine, schema)
        }

    def _owe(self, owed: pending.PendingDelivery) -> None:
        if (owed.service, owed.handler, owed.event_id) not in self._left:
            super()._owe(owed)


class Alone:
    """One participant, or a plain service, and everyone else played by the test."""

    def __init__(self, service: Service, engine: Engine) -> None:
        self.service = service
        self._engine = engine
        self._play = Fresh({service: engine})
        self._end = self._play._end_of(engine, service.schema)

    def hear(self, event: object, *, saga_id: UUID | None = None, may_fail: bool = False) -> UUID:
        """Handle *event* as one of the saga given (by default, of a new one), and whatever that
        leaves to be done here now (see `let_time_pass`); returns the saga's id.

        Raises `AssertionError` where no handler takes it, and where one fails, unless *may_fail*.
        """
        registry = self.service.registry
        return self._hear(registry.of(event), event, saga_id or uuid4(), may_fail)

    def abort(self, saga_id: UUID, *, may_fail: bool = False) -> None:
        """Hear from another participant that the saga is aborted, and undo what was done here."""
        aborted = SagaAborted(saga_id, _OTHERS, "test", "the test says so", new_id())
        self._hear(ABORTED, aborted, saga_id, may_fail)

    def let_time_pass(self) -> None:
        """Handle what is owed for later (a deadline, a delayed step), the first due first."""
        while later := [one for one in self._play.collect() if one.due is not None]:
            self._deliver([soonest(later)], may_fail=False)

    def complete(self, saga_id: UUID) -> None:
        """Hear from another participant that the saga is completed."""
        self._hear(COMPLETED, SagaCompleted(saga_id, _OTHERS, "test"), saga_id, may_fail=False)

    @property
    def published(self) -> list[Any]:
        """What the service has published since this object was made, oldest first, as payloads;
        without what the runtime says to itself and its peers (`saga.*`)."""
        own = {event_type.name for event_type in CONTROL_EVENTS}
        with Session(self._engine) as session:
            rows = session.execute(
                statement(_PUBLISHED, self.service.schema), {"end": self._end}
            ).all()
        envelopes = [decode(bytes(row.body)) for row in rows]
        return [
            self.service.registry.read(one.type, one.version, one.data)
            for one in envelopes
            if one.source == self.service.name and one.type not in own
        ]

    def state(self, saga_id: UUID) -> str | None:
        """Where the saga stands here: running, completed, compensating, compensated; None where it
        was never heard of."""
        with Session(self._engine) as session:
            state: str | None = session.execute(
                statement(_STATE, self.service.schema),
                {"saga_id": saga_id, "participant": self.service.name},
            ).scalar()
        return state

    def _hear(self, event_type: EventType, event: object, saga_id: UUID, may_fail: bool) -> UUID:
        envelope = encode(
            event_type, event, source=_OTHERS,
            correlation_id=str(saga_id), extensions={SAGA_ID: str(saga_id)},
        )  # fmt: skip
        if event_type.name not in self.service.bindings:
            takes = ", ".join(self.service.bindings)
            raise AssertionError(
                f"{self.service.name} does not take {event_type}; it takes {takes}"
            )
        self._deliver(
            [Message(self.service.name, event_type.name, envelope.id, envelope.body)], may_fail
        )
        return saga_id

    def _deliver(self, messages: Iterable[Message], may_fail: bool) -> None:
        todo = list(messages)
        while todo:
            receipt = self._play.deliver(todo.pop(0))
            failed = [name for name, one in receipt.outcomes.items() if one in _NOT_HANDLED]
            if receipt.refused or failed:
                if may_fail:
                    return
                raise AssertionError(f"{receipt}: {self._why(failed)}")
            due = [one for one in self._play.collect() if one.due is None]
            todo += [one for one in due if one not in todo]

    def _why(self, handlers: list[str]) -> str:
        with Session(self._engine) as session:
            for owed in pending.list_pending(session, limit=1_000, schema=self.service.schema):
                if owed.handler in handlers and owed.error:
                    return owed.error
        return "see its dead letters and quarantine"


def _owed(engine: Engine, schema: str) -> list[pending.PendingDelivery]:
    with Session(engine) as session:
        return list(pending.list_pending(session, limit=1_000_000, schema=schema))
