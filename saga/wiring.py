"""How a participant's declarations become handlers of a service: what is delivered to which operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from outbox.errors import ConfigurationError
from outbox.events import EventType
from outbox.service import Delivery, Handler, RetryPolicy, Service
from saga import control, decisions, peers
from saga.choreography import Place
from saga.declaration import Deadline, Start, Step
from saga.journal import Journal
from saga.reaction import Owner, Reaction
from saga.runtime import Runtime
from saga.step import put_off
from saga.unwinding import compensate, park_compensation, refuse_removed

PATIENT: Final = RetryPolicy(attempts=20)
"""For compensations: they have to succeed some time, so they are given more than a step is."""

R_ = TypeVar("R_", bound=Reaction[..., Any])


class Wiring(Service):
    """The part of a participant that registers handlers."""

    compensation_retry: RetryPolicy

    def _wire(self, open_journal: Callable[[Any], Journal], *, unwinds_eagerly: bool) -> None:
        control.register_control_events(self.registry)
        self._reactions: dict[str, Reaction[..., Any]] = {}
        self._by_any_name: dict[str, Reaction[..., Any]] = {}
        self._own_handlers: set[str] = set()
        self._opening: set[str] = set()
        """Its handlers that lock the saga of each event, and write down one that is new."""
        self._runtime = Runtime(
            self.name, self.registry, self._by_any_name, open_journal, unwinds_eagerly
        )
        for event_type, run in (
            (control.ABORTED, decisions.on_aborted),
            (control.COMPLETED, decisions.on_completed),
        ):
            self._add_decision(event_type, run)
            self._opening.add(self._runtime.handler(event_type.name))
        # Also where it unwinds eagerly: an abort by hand does not know that, and leaves runs waiting.
        self._add_decision(control.UNDONE, decisions.on_undone)
        self._add_introductions()

    @property
    def _owner(self) -> Owner:
        return Owner(self.name, self.registry)

    def _only_start(self, place: Place) -> Start:
        starts = [one for one in self._reactions.values() if isinstance(one, Start)]
        if len(starts) == 1:
            return starts[0]
        raise ConfigurationError(
            f"{place}: a deadline of {self.name} must say what it counts from: it has "
            f"{len(starts)} starts declared so far; after=the start, or a step"
        )

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
        if self.handler(self._runtime.handler(name)) is not None:
            raise ConfigurationError(
                f"{reaction.place}: participant {self.name} has a handler named "
                f"{self._runtime.handler(name)} already (@{self.name}.on); rename one of them"
            )

    def _add_reaction(
        self,
        reaction: R_,
        run: Callable[[Runtime, R_, Any, Any], None],
        park: Callable[[Runtime, R_, Any, Any, BaseException], None],
        retry: RetryPolicy | None,
        prepare: Callable[[Any, Any], Callable[[], Any] | None] | None = None,
    ) -> None:
        handler = Handler(
            name=self._runtime.handler(reaction.name),
            event_types=frozenset(event_type.name for event_type in reaction.on),
            run=partial(run, self._runtime, reaction),
            retry=retry or self.retry,
            exhausted=partial(park, self._runtime, reaction),
            versions=frozenset((one.name, one.version) for one in reaction.on),
            prepare=prepare,
            subscribes=not isinstance(reaction, Deadline),
        )
        for name in reaction.was:
            # Under an old name it takes what is owed to that: retries, dead letters.
            self._add(replace(handler, name=self._runtime.handler(name), subscribes=False))
        if isinstance(reaction, Step) and reaction.delay is not None:
            later = self._runtime.delayed_handler(reaction.name)
            self._add(replace(handler, name=later, subscribes=False))
            handler = replace(handler, run=partial(put_off, self._runtime, reaction), prepare=None)
        elif not isinstance(reaction, Deadline):
            self._opening.add(handler.name)
        self._add(handler)

    def _add_child(self, step: Reaction[..., Any], hear: Callable[[Delivery, Any], None]) -> None:
        self._add(
            Handler(
                name=f"{self._runtime.handler(step.name)}.child",
                event_types=frozenset({control.COMPLETED.name, control.ABORTED.name}),
                run=hear,
                retry=PATIENT,
                exhausted=partial(decisions.park_decision, self._runtime),
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
                name=self._runtime.handler(event_type.name),
                event_types=frozenset({event_type.name}),
                run=partial(run, self._runtime),
                retry=PATIENT,
                exhausted=partial(decisions.park_decision, self._runtime),
                # Who says such a thing has written it down in the same commit.
                hears_itself=False,
            )
        )

    def _add_introductions(self) -> None:
        for event_type, run in (
            (control.INTRODUCED, peers.on_introduced),
            (control.INTRODUCTION_DUE, peers.introduce),
        ):
            self._add(
                Handler(
                    name=self._runtime.handler(event_type.name),
                    event_types=frozenset({event_type.name}),
                    run=partial(run, self._runtime),
                    retry=PATIENT,
                    subscribes=event_type is control.INTRODUCED,
                    hears_itself=False,
                )
            )

    def _add(self, handler: Handler) -> None:
        self.add(handler)
        self._own_handlers.add(handler.name)
