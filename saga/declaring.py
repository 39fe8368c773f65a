"""How steps, joins, deadlines and starts are declared, and what of that is refused at import."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from outbox.errors import ConfigurationError
from outbox.service import RetryPolicy
from saga.child import hear_of_child, run_child
from saga.choreography import Exhausted, Place
from saga.deadline import run_deadline
from saga.declaration import (
    ChildSaga,
    Deadline,
    EventClasses,
    ExternalStep,
    Join,
    Start,
    Step,
    event_types,
    old_names,
)
from saga.external import finish_call, prepare_call
from saga.join import park_join, run_join
from saga.reaction import F, P, R
from saga.step import park_step, run_step
from saga.wiring import Wiring


class Declaring(Wiring):
    """The part of a participant that declarations call."""

    def step(
        self,
        *,
        on: type[Any],
        emits: EventClasses = None,
        rejects: EventClasses = None,
        nothing_to_undo: str | None = None,
        exhausted: Exhausted = "stuck",
        external: bool = False,
        pivot: bool = False,
        no_deadline: str | None = None,
        retriable: bool = False,
        after: timedelta | None = None,
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
        A *pivot* decides the saga: once it is done the saga is completed, and only goes forward.
        It may reject. *no_deadline* says why it may wait for ever. The steps after it are
        *retriable*: they do not reject, and are not undone.
        *after* delays it: it runs that long after its event came, if the saga is not aborted then.
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
                exhausted=exhausted, was=old_names(was), completes=pivot, retriable=retriable,
                no_deadline=no_deadline, delay=after,
            )  # fmt: skip
            self._declare(step, compensation_retry)
            if isinstance(step, ExternalStep):
                prepare = partial(prepare_call, self._runtime, step)
                self._add_reaction(step, finish_call, park_step, retry, prepare)
            else:
                self._add_reaction(step, run_step, park_step, retry)
            return step

        return declare

    def child(
        self,
        *,
        on: type[Any],
        opens: type[Any],
        rejects: EventClasses,
        emits: EventClasses = None,
        nothing_to_undo: str | None = None,
        name: str | None = None,
        retry: RetryPolicy | None = None,
        compensation_retry: RetryPolicy | None = None,
    ) -> Callable[[Callable[P, R]], ChildSaga[P, R]]:
        """Declare a step that starts another saga, and is done once that one is completed.

        The decorated `fn(event, session)` returns the first event of the other saga, of class
        *opens* (which `starts` or `compensation` has declared), or raises `Reject`. What the step
        emits in the end is said by its `.completed`, what it rejects with when the other saga is
        aborted by its `.aborted`. Its compensation undoes a completed one, say with a saga that
        takes it back. Raises `ConfigurationError`.
        """
        place = Place.of_caller()
        what = f"{place}: a child saga of {self.name}"
        triggers = event_types(on, self.registry, what)
        (opened,) = event_types(opens, self.registry, what)
        answers = event_types(emits, self.registry, what)
        refusals = event_types(rejects, self.registry, what)

        def declare(function: Callable[P, R]) -> ChildSaga[P, R]:
            step = ChildSaga(
                function, owner=self._owner, name=name or function.__name__, place=place,
                on=triggers, emits=answers, rejects=refusals, nothing_to_undo=nothing_to_undo,
                opens=opened,
            )  # fmt: skip
            self._declare(step, compensation_retry)
            self._add_reaction(step, run_child, park_step, retry)
            self._add_child(step, partial(hear_of_child, self._runtime, step))
            return step

        return declare

    def join(
        self,
        *on: type[Any],
        emits: EventClasses = None,
        rejects: EventClasses = None,
        needs: int | None = None,
        completes: bool = False,
        no_deadline: str | None = None,
        nothing_to_undo: str | None = None,
        exhausted: Exhausted = "stuck",
        name: str | None = None,
        was: str | Iterable[str] = (),
        retry: RetryPolicy | None = None,
        compensation_retry: RetryPolicy | None = None,
    ) -> Callable[[Callable[P, R]], Join[P, R]]:
        """Declare the decorated `fn(event, ..., session)` as the answer to all of *on* together.

        It gets one event of each class, in the order declared, whatever order they came in; once
        per saga, and never after an abort. *needs* says how many are enough (1: any of them): it
        runs as soon as that many have come, with None for each of the others. With *completes*,
        its commit is the saga's decision: from there it can only go forward; *no_deadline* says why
        it may wait for ever. The rest is as in `step`.
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
                needs=len(triggers) if needs is None else needs, no_deadline=no_deadline,
            )  # fmt: skip
            self._declare(join, compensation_retry)
            self._add_reaction(join, run_join, park_join, retry)
            return join

        return declare

    def deadline(
        self,
        *,
        rejects: type[Any],
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
        at: Callable[[Any], datetime] | None = None,
        after: Start | Step[..., Any] | None = None,
        name: str | None = None,
        retry: RetryPolicy | None = None,
    ) -> Callable[[Callable[P, R]], Deadline[P, R]]:
        """Declare that a saga which is not decided in time is aborted.

        The time counts from *after*, a start or a step of this participant, by default its one
        start; or from what ``at(event)`` gives, an aware datetime. The decorated
        `fn(event, session)` gets the event of that start or step and returns the one of class
        *rejects* that says that the time has passed. It belongs to the participant that decides
        the saga (its completing join, its pivot): there it races with the decision on one lock.
        Raises `ConfigurationError`.
        """
        place = Place.of_caller()
        within = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        counted_from = after or self._only_start(place)
        refusals = event_types(rejects, self.registry, f"{place}: a deadline of {self.name}")

        def declare(function: Callable[P, R]) -> Deadline[P, R]:
            deadline = Deadline(
                function, owner=self._owner, name=name or function.__name__, place=place,
                on=counted_from.on, rejects=refusals, within=within, at=at,
            )  # fmt: skip
            self._declare(deadline, None)
            self._add_reaction(deadline, run_deadline, park_step, retry)
            counted_from.deadlines.append(deadline)
            return deadline

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
