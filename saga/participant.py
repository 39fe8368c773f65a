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

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args
from uuid import UUID

from outbox import publishing
from outbox.errors import ConfigurationError
from outbox.events import EventType, Registry
from outbox.events import registry as default_registry
from outbox.service import Handler, RetryPolicy, Service
from outbox.sql import DEFAULT_SCHEMA
from saga import control, decisions, peers, renamed, retention
from saga.choreography import (
    EventRef,
    Exhausted,
    JoinSpec,
    ParticipantSpec,
    Place,
    StartSpec,
    StepSpec,
)
from saga.context import SAGA_ID, Emission, current
from saga.declaration import (
    EventClasses,
    ExternalStep,
    F,
    Join,
    Owner,
    P,
    R,
    Reaction,
    Start,
    Step,
    event_types,
    old_names,
)
from saga.external import finish_call, prepare_call
from saga.join import park_join, run_join
from saga.runtime import Runtime
from saga.start import start
from saga.step import park_step, run_step
from saga.store import SqlJournal
from saga.unwinding import compensate, park_compensation, refuse_removed

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from saga.journal import Journal

PATIENT: Final = RetryPolicy(attempts=20)
"""For compensations: they have to succeed some time, so they are given more than a step is."""

Unwinding = Literal["reverse", "eager"]

R_ = TypeVar("R_", bound=Reaction[..., Any])


class Participant(Service):
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
        control.register_control_events(registry)
        self._reactions: dict[str, Reaction[..., Any]] = {}
        self._by_any_name: dict[str, Reaction[..., Any]] = {}
        self._own_handlers: set[str] = set()
        self._runtime = Runtime(
            name, registry, self._by_any_name, self.journal, unwinds_eagerly=unwind == "eager"
        )
        self._add_decision(control.ABORTED, decisions.on_aborted)
        self._add_decision(control.COMPLETED, decisions.on_completed)
        # Also where it unwinds eagerly: an abort by hand does not know that, and leaves runs waiting.
        self._add_decision(control.UNDONE, decisions.on_undone)
        self._add_introductions()

    def journal(self, session: Any) -> Journal:
        """This participant's journal in the transaction of *session*."""
        if was := renamed.names(self._reactions.values()):
            return renamed.RenamedJournal(
                session, self.name, self.schema, decides=self.decides, was=was
            )
        return SqlJournal(session, self.name, self.schema, decides=self.decides)

    @property
    def decides(self) -> bool:
        """Whether sagas are decided here: it has what completes them."""
        return any(reaction.completes for reaction in self._reactions.values())

    # ---- declaring ----

    def step(
        self,
        *,
        on: type[Any],
        emits: EventClasses = None,
        rejects: EventClasses = None,
        nothing_to_undo: str | None = None,
        exhausted: Exhausted = "stuck",
        external: bool = False,
        name: str | None = None,
        was: str | Iterable[str] = (),
        retry: RetryPolicy | None = None,
        compensation_retry: RetryPolicy | None = None,
    ) -> Callable[[Callable[P, R]], Step[P, R]]:
        """Declare the decorated `fn(event, session)` as this participant's answer to *on*.

        It returns one event of a class in *emits* (None where that is empty), or raises
        `Reject(event)` with one in *rejects*. Once done, it is undone by its `.compensation` when
        the saga is aborted; *nothing_to_undo* says why it needs none. When its attempts are used
        up, the saga is stuck until a person redrives it, or, with ``exhausted="abort"``, aborted:
        only for a step whose failed attempts leave nothing behind anywhere. *name* (by default the
        function's) stands in the journal and in the inbox, so it must outlive refactorings; a step
        that had another one is declared with *was*, until no saga from before is open.
        An *external* one acts outside of the database: it is `fn(event)`, called outside of any
        transaction after the intent to do so was committed (see `saga.external`).
        Raises `ConfigurationError` at import, with the file and the line.
        """
        place = Place.of_caller()
        what = f"{place}: a step of {self.name}"
        triggers = event_types(on, self.registry, what)
        answers = event_types(emits, self.registry, what)
        refusals = event_types(rejects, self.registry, what)

        def declare(function: Callable[P, R]) -> Step[P, R]:
            step = (ExternalStep if external else Step)(
                function, owner=self._owner, name=name or function.__name__, place=place,
                on=triggers, emits=answers, rejects=refusals, nothing_to_undo=nothing_to_undo,
                exhausted=exhausted, was=old_names(was),
            )  # fmt: skip
            self._declare(step, compensation_retry)
            if isinstance(step, ExternalStep):
                prepare = partial(prepare_call, self._runtime, step)
                self._add_reaction(step, finish_call, park_step, retry, prepare)
            else:
                self._add_reaction(step, run_step, park_step, retry)
            return step

        return declare

    def join(
        self,
        *on: type[Any],
        emits: EventClasses = None,
        rejects: EventClasses = None,
        completes: bool = False,
        nothing_to_undo: str | None = None,
        exhausted: Exhausted = "stuck",
        name: str | None = None,
        was: str | Iterable[str] = (),
        retry: RetryPolicy | None = None,
        compensation_retry: RetryPolicy | None = None,
    ) -> Callable[[Callable[P, R]], Join[P, R]]:
        """Declare the decorated `fn(event, ..., session)` as the answer to all of *on* together.

        It gets one event of each class, in the order declared, whatever order they came in; once
        per saga, and never after an abort. With *completes*, its commit is the saga's decision:
        from there it can only go forward. The rest is as in `step`.
        """
        place = Place.of_caller()
        what = f"{place}: a join of {self.name}"
        triggers = event_types(on, self.registry, what)
        if not triggers:
            raise ConfigurationError(f"{what} waits for no event: name the event classes")
        if len({event_type.name for event_type in triggers}) < len(triggers):
            raise ConfigurationError(f"{what} names two versions of one event")
        answers = event_types(emits, self.registry, what)
        refusals = event_types(rejects, self.registry, what)

        def declare(function: Callable[P, R]) -> Join[P, R]:
            join = Join(
                function, owner=self._owner, name=name or function.__name__, place=place,
                on=triggers, emits=answers, rejects=refusals, nothing_to_undo=nothing_to_undo,
                exhausted=exhausted, completes=completes, was=old_names(was),
            )  # fmt: skip
            self._declare(join, compensation_retry)
            self._add_reaction(join, run_join, park_join, retry)
            return join

        return declare

    def starts(
        self,
        event: type[Any],
        *,
        nothing_to_undo: str | None = None,
        compensation_retry: RetryPolicy | None = None,
    ) -> Start:
        """Declare that `start` may be called with *event*. Its `.compensation` undoes what the
        caller of `start` wrote; *nothing_to_undo* says why there is none."""
        place = Place.of_caller()
        (event_type,) = event_types(event, self.registry, f"{place}: a start of {self.name}")
        declared = Start(
            owner=self._owner, place=place, event=event_type, nothing_to_undo=nothing_to_undo
        )
        self._declare(declared, compensation_retry)
        return declared

    def compensation(
        self, event: type[Any], *, retry: RetryPolicy | None = None
    ) -> Callable[[F], F]:
        """Declare that *event* starts sagas, and the decorated `fn(event, session)` as what undoes
        the writes made beside the start."""
        return self.starts(event, compensation_retry=retry).compensation

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

    def keep_up(self, engine: Engine, window: timedelta) -> None:
        """Introduce it where that is due, and forget sagas that ended long ago."""
        self.see_to_introduction(engine)
        after = retention.no_shorter_than(window, self.retention)
        retention.forget_ended(engine, self.name, after, schema=self.schema)

    # ---- looking ----

    @property
    def spec(self) -> ParticipantSpec:
        """What has been declared so far, as plain data."""
        declared = self._reactions.values()
        return ParticipantSpec(
            name=self.name,
            starts=tuple(_start_spec(one) for one in declared if isinstance(one, Start)),
            steps=tuple(_step_spec(one) for one in declared if isinstance(one, Step)),
            joins=tuple(_join_spec(one) for one in declared if isinstance(one, Join)),
        )

    @property
    def answers(self) -> frozenset[str]:
        """Event types that its steps and joins answer."""
        return self._runtime.answers

    @property
    def subscriptions(self) -> list[str]:
        """Event types that it takes outside of sagas (`@participant.on`), sorted."""
        plain = (one for one in self.handlers if one.name not in self._own_handlers)
        return sorted({name for one in plain if one.subscribes for name in one.event_types})

    # ---- wiring ----

    @property
    def _owner(self) -> Owner:
        return Owner(self.name, self.registry)

    def _declare(self, reaction: Reaction[..., Any], retry: RetryPolicy | None) -> None:
        for name in (reaction.name, *reaction.was):
            self._refuse_taken(name, reaction)
        self._reactions[reaction.name] = reaction
        for name in (reaction.name, *reaction.was):
            self._by_any_name[name] = reaction
            self._add(
                Handler(
                    name=self._runtime.compensation_handler(name),
                    event_types=frozenset({control.COMPENSATION_DUE.name}),
                    run=partial(compensate, self._runtime, reaction),
                    retry=retry or self.compensation_retry,
                    exhausted=partial(park_compensation, self._runtime, reaction),
                    subscribes=False,
                )
            )

    def _refuse_taken(self, name: str, reaction: Reaction[..., Any]) -> None:
        taken = self._by_any_name.get(name)
        if taken is not None:
            had = "that was" if name in taken.was else "named"
            raise ConfigurationError(
                f"{reaction.place}: participant {self.name} has a {taken.kind} {had} "
                f"{name} already, at {taken.place}; give one of them another name"
            )
        if self.handler(f"{self.name}.{name}") is not None:
            raise ConfigurationError(
                f"{reaction.place}: participant {self.name} has a handler named "
                f"{self.name}.{name} already (@{self.name}.on); rename one of them"
            )

    def _add_reaction(
        self,
        reaction: R_,
        run: Callable[[Runtime, R_, Any, Any], None],
        park: Callable[[Runtime, R_, Any, Any, BaseException], None],
        retry: RetryPolicy | None,
        prepare: Callable[[Any, Any], Callable[[], Any] | None] | None = None,
    ) -> None:
        for name in (reaction.name, *reaction.was):
            self._add(
                Handler(
                    name=f"{self.name}.{name}",
                    event_types=frozenset(event_type.name for event_type in reaction.on),
                    run=partial(run, self._runtime, reaction),
                    retry=retry or self.retry,
                    exhausted=partial(park, self._runtime, reaction),
                    versions=frozenset((one.name, one.version) for one in reaction.on),
                    prepare=prepare,
                    # Under an old name it takes what is owed to that: retries, dead letters.
                    subscribes=name == reaction.name,
                )
            )

    def stand_in(self, name: str) -> Handler:
        """As of any service; a compensation that is not here any more makes the saga stuck."""
        stand_in = super().stand_in(name)
        step = name.removeprefix(f"{self.name}.").removesuffix(".compensation")
        if name != self._runtime.compensation_handler(step):
            return stand_in
        return replace(
            stand_in,
            run=partial(refuse_removed, self._runtime, step),
            exhausted=partial(park_compensation, self._runtime, None),
        )

    def _add_decision(
        self, event_type: EventType, run: Callable[[Runtime, Any, Any], None]
    ) -> None:
        self._add(
            Handler(
                name=f"{self.name}.{event_type.name}",
                event_types=frozenset({event_type.name}),
                run=partial(run, self._runtime),
                retry=PATIENT,
                exhausted=partial(decisions.park_decision, self._runtime),
            )
        )

    def _add_introductions(self) -> None:
        for event_type, run in (
            (control.INTRODUCED, peers.on_introduced),
            (control.INTRODUCTION_DUE, peers.introduce),
        ):
            self._add(
                Handler(
                    name=f"{self.name}.{event_type.name}",
                    event_types=frozenset({event_type.name}),
                    run=partial(run, self._runtime),
                    retry=PATIENT,
                    subscribes=event_type is control.INTRODUCED,
                )
            )

    def _add(self, handler: Handler) -> None:
        self.add(handler)
        self._own_handlers.add(handler.name)


def _refs(types: tuple[EventType, ...]) -> tuple[EventRef, ...]:
    return tuple(EventRef.to(event_type) for event_type in types)


def _start_spec(one: Start) -> StartSpec:
    (event,) = _refs(one.on)
    return StartSpec(one.owner.participant, event, one.place, one.undo_place, one.nothing_to_undo)


def _step_spec(one: Step[..., Any]) -> StepSpec:
    (on,) = _refs(one.on)
    return StepSpec(
        one.owner.participant, one.name, on, _refs(one.emits), _refs(one.rejects), one.place,
        one.undo_place, one.nothing_to_undo, one.exhausted, one.was, one.is_external,
        one.resolver is not None,
    )  # fmt: skip


def _join_spec(one: Join[..., Any]) -> JoinSpec:
    return JoinSpec(
        one.owner.participant, one.name, _refs(one.on), _refs(one.emits), _refs(one.rejects),
        one.completes, one.place, one.undo_place, one.nothing_to_undo, one.exhausted, one.was,
    )  # fmt: skip
