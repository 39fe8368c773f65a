"""A participant: a service that takes part in sagas.

    inventory = Participant("inventory")

    @inventory.step(on=OrderCreated, emits=StockReserved, rejects=StockRejected)
    def reserve_stock(order: OrderCreated, session: Session) -> StockReserved: ...

    @reserve_stock.compensation
    def release_stock(order: OrderCreated, reserved: StockReserved, session: Session) -> None: ...

It knows its own steps, its own database and its own queue, and nobody else's. What is declared
wrongly is refused at import, with the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args
from uuid import UUID

from outbox import publishing
from outbox.errors import ConfigurationError
from outbox.events import Registry
from outbox.events import registry as default_registry
from outbox.service import RetryPolicy
from outbox.sql import DEFAULT_SCHEMA
from saga import peers, renamed, retention
from saga.batching import BatchJournal, remember, remembered_in
from saga.choreography import ParticipantSpec
from saga.context import SAGA_ID, Emission, current
from saga.declaring import Declaring
from saga.runtime import known_saga_id_of
from saga.specs import spec_of
from saga.start import start
from saga.store import SqlJournal
from saga.wiring import PATIENT

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
    from sqlalchemy.orm import Session

    from outbox.envelope import Envelope
    from outbox.service import Delivery
    from saga.journal import Journal

Unwinding = Literal["reverse", "eager"]


class Participant(Declaring):
    """A service with steps, joins and compensations, and the journal of the sagas it is part of."""

    def __init__(
        self,
        name: str,
        *,
        schema: str = DEFAULT_SCHEMA,
        registry: Registry = default_registry,
        exchange: str = "events",
        queue: str | None = None,
        retry: RetryPolicy | None = None,
        compensation_retry: RetryPolicy = PATIENT,
        retention: timedelta = retention.DEFAULT,
        unwind: Unwinding = "reverse",
    ) -> None:
        """*retry* is for steps and joins, *compensation_retry* for compensations, where they have
        none of their own; *retention* is how long a saga is remembered after its end (at least the
        dedupe window). *unwind* says when its steps are undone after an abort: "reverse", once the
        steps that answered their events are, wherever those ran; "eager", all at once.
        Raises `ConfigurationError`."""
        if unwind not in get_args(Unwinding):
            raise ConfigurationError(
                f"participant {name}: unwind={unwind!r}; it can be {' or '.join(get_args(Unwinding))}"
            )
        super().__init__(
            name, schema=schema, registry=registry, exchange=exchange, queue=queue, retry=retry
        )
        self.compensation_retry = compensation_retry
        self.retention = retention
        self._wire(self.journal, unwinds_eagerly=unwind == "eager")

    def journal(self, session: Any) -> Journal:
        """This participant's journal in the transaction of *session*."""
        if was := renamed.names(self._reactions.values()):
            return renamed.RenamedJournal(
                session, self.name, self.schema, decides=self.decides, was=was
            )
        if remembered := remembered_in(session, self.name, self.schema):
            return BatchJournal(
                session, self.name, self.schema, decides=self.decides, remembered=remembered
            )
        return SqlJournal(session, self.name, self.schema, decides=self.decides)

    @property
    def decides(self) -> bool:
        """Whether sagas are decided here: it has what completes them."""
        return any(reaction.completes for reaction in self._reactions.values())

    # ---- working ----

    def start(self, session: Any, event: object, *, saga_id: UUID | None = None) -> UUID:
        """Open a saga: journal and publish *event* with the transaction of *session*; its id.

        *session* is whatever `outbox.publish` takes; nothing is committed here, and after a
        rollback there was no saga. A command that may come twice gives its own *saga_id* (say, a
        UUIDv5 of the order's number): the second call raises `AlreadyStarted`. Raises, before
        anything is written, what `publish` raises, and `UndeclaredEvent`.
        """
        return start(self._runtime, session, event, saga_id)

    async def astart(
        self,
        session: AsyncSession | AsyncConnection,
        event: object,
        *,
        saga_id: UUID | None = None,
    ) -> UUID:
        """As `start`, for an `AsyncSession` or an `AsyncConnection`."""
        started: UUID = await session.run_sync(
            lambda sync: self.start(sync, event, saga_id=saga_id)
        )
        return started

    def publish(self, session: Any, event: object) -> UUID:
        """Publish *event*; from inside a step, as part of its saga."""
        (event_id,) = self.publish_all(session, [event])
        return event_id

    def publish_all(self, session: Any, events: Iterable[object]) -> list[UUID]:
        """Publish *events* in one statement; from inside a step, as part of its saga."""
        saga = current()
        belongs = saga is not None and saga.participant == self.name
        events = list(events)
        ids = publishing.publish_all(
            session, events, source=self.name, registry=self.registry, schema=self.schema,
            correlation_id=str(saga.saga_id) if saga and belongs else None,
            extensions={SAGA_ID: str(saga.saga_id)} if saga and belongs else None,
        )  # fmt: skip
        if saga and belongs:
            types = [self.registry.of(event).name for event in events]
            saga.published.extend(map(Emission, ids, types))
        return ids

    def see_to_introduction(self, engine: Engine) -> None:
        """Owe the others an introduction, unless they have had it (see `saga.peers`)."""
        peers.see_to_introduction(self._runtime, engine)

    def lock_order(self, envelope: Envelope) -> str:
        """The saga, whose row each of its handlers locks first."""
        return str(envelope.extensions.get(SAGA_ID) or super().lock_order(envelope))

    def begin_batch(self, deliveries: Sequence[Delivery], session: Session) -> None:
        """Lock and read the sagas of a batch at once (see `saga.batching`)."""
        if renamed.names(self._reactions.values()):
            return
        named = [(one.handler, known_saga_id_of(one)) for one in deliveries]
        sagas = {saga_id for _, saga_id in named if saga_id}
        opens = {saga_id for name, saga_id in named if saga_id and name in self._opening}
        if sagas:
            remember(
                session, self.name, self.schema, decides=self.decides, sagas=sagas, opens=opens
            )

    def keep_up(self, engine: Engine, window: timedelta) -> None:
        """Introduce it where that is due, and forget sagas that ended long ago."""
        self.see_to_introduction(engine)
        after = retention.no_shorter_than(window, self.retention)
        retention.forget_ended(engine, self.name, after, schema=self.schema)

    # ---- looking ----

    @property
    def spec(self) -> ParticipantSpec:
        """What has been declared so far, as plain data."""
        return spec_of(self.name, self._reactions.values())

    @property
    def answers(self) -> frozenset[str]:
        """Event types that its steps and joins answer."""
        return self._runtime.answers

    @property
    def subscriptions(self) -> list[str]:
        """Event types that it takes outside of sagas (`@participant.on`), sorted."""
        plain = (one for one in self.handlers if one.name not in self._own_handlers)
        return sorted({name for one in plain if one.subscribes for name in one.event_types})
