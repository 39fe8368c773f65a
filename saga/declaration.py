"""What a participant can declare: steps, joins, deadlines and starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any

from outbox.errors import ConfigurationError, UnregisteredEvent
from outbox.events import EventType, Registry
from saga.choreography import Place
from saga.errors import InvalidDeadline
from saga.reaction import F_, F, Owner, P, R, Reaction, check_parameters, check_reason

EventClasses = type[Any] | Iterable[type[Any]] | None


class Step(Reaction[P, R]):
    """A declared step. Made by `@participant.step(...)`."""

    is_external = False
    resolver: Callable[..., Any] | None = None
    recorder: Callable[..., None] | None = None

    @property
    def is_never_undone(self) -> bool:
        """As of any reaction; also a pivot, which decides the saga."""
        return self.retriable or self.completes

    def resolve(self, function: F_) -> F_:
        """Of an external step: the decorated function finds out whether an earlier call took effect.

        It takes the triggering event and asks outside, by `saga.current().idempotency_key`. It
        returns what the step would have returned (True, for a step that emits nothing) if the call
        took effect, None if it did not *and never will*: cancel the key there if you can. It raises
        `Unknown` where it cannot tell, `Reject` where the answer was no.
        Raises `ConfigurationError` for a second one, or one that takes other parameters.
        """
        self.resolver = self._hook(function, "resolve", self.resolver, self._parameters())
        return function

    def record(self, function: F) -> F:
        """Of an external step: the decorated function writes down that the call took effect.

        It takes the triggering event, the emitted event if there is one, and the session, and runs
        in the transaction that publishes the result. Its compensation finds what it has written.
        """
        parameters = self._undo_parameters()
        self.recorder = self._hook(function, "record", self.recorder, parameters)
        return function

    def _hook(self, function: F_, name: str, before: object, parameters: list[str]) -> F_:
        what = f"{Place.of_function(function)}: the {name} hook of {self}"
        if not self.is_external:
            raise ConfigurationError(f"{what}: only a step with external=True has one")
        if before is not None:
            raise ConfigurationError(f"{what} is its second one")
        check_parameters(function, parameters, what)
        return function


class ExternalStep(Step[P, R]):
    """A step whose function acts outside of the database. Made by `@participant.step(external=True)`."""

    kind = "external step"
    is_external = True

    def _parameters(self) -> list[str]:
        return super()._parameters()[:-1]

    def _undo_parameters(self) -> list[str]:
        return [*self._parameters(), *(["emitted"] if self.emits else []), "session"]

    def _refuse_mistakes(self) -> None:
        super()._refuse_mistakes()
        if self.exhausted != "stuck":
            raise ConfigurationError(
                f"{self.place}: {self.kind} {self}: exhausted={self.exhausted!r} would take an "
                "uncertain call for none; leave it out and give the step a resolve hook"
            )


class ChildSaga(Step[P, R]):
    """A step that starts another saga and waits for its end. Made by `@participant.child(...)`."""

    kind = "child saga"

    def __init__(self, function: Callable[P, R], *, opens: EventType, **declared: Any) -> None:
        self.opens = opens
        self.on_completed: Callable[..., Any] | None = None
        self.on_aborted: Callable[..., Any] | None = None
        super().__init__(function, **declared)

    def completed(self, function: F_) -> F_:
        """The decorated function says what the step emits once the child saga is completed.

        It takes the triggering event and the session, and runs in the transaction that publishes.
        """
        self.on_completed = self._end(function, "completed", self.on_completed)
        return function

    def aborted(self, function: F_) -> F_:
        """The decorated function says what the step rejects with once the child saga is aborted.

        It takes the triggering event and the session.
        """
        self.on_aborted = self._end(function, "aborted", self.on_aborted)
        return function

    def refuse_what_is_missing(self) -> None:
        """Raise `ConfigurationError` unless both ends of the child have been declared."""
        for name, end in (("completed", self.on_completed), ("aborted", self.on_aborted)):
            if end is None:
                raise ConfigurationError(
                    f"{self.place}: {self.kind} {self} does not say what follows when its saga is "
                    f"{name}: @{self.name}.{name}"
                )

    def _end(self, function: F_, name: str, before: object) -> F_:
        what = f"{Place.of_function(function)}: the {name} end of {self}"
        if before is not None:
            raise ConfigurationError(f"{what} is its second one")
        check_parameters(function, self._parameters(), what)
        return function

    def _refuse_mistakes(self) -> None:
        super()._refuse_mistakes()
        if not self.rejects:
            raise ConfigurationError(
                f"{self.place}: {self.kind} {self} needs rejects=..., for when its saga is aborted"
            )


class Join(Reaction[P, R]):
    """A declared join. Made by `@participant.join(...)`."""

    kind = "join"

    def __init__(self, function: Callable[P, R], *, needs: int, **declared: Any) -> None:
        self.needs = needs
        """How many of its events it waits for."""
        super().__init__(function, **declared)

    def _refuse_mistakes(self) -> None:
        super()._refuse_mistakes()
        if not 1 <= self.needs <= len(self.on):
            raise ConfigurationError(
                f"{self.place}: {self.kind} {self} needs={self.needs} of its {len(self.on)} events"
            )


class Deadline(Reaction[P, R]):
    """A declared deadline. Made by `@participant.deadline(...)`."""

    kind = "deadline"

    def __init__(
        self,
        function: Callable[P, R],
        *,
        within: timedelta,
        at: Callable[[Any], datetime] | None,
        **declared: Any,
    ) -> None:
        self.within = within
        self.at = at
        super().__init__(function, **declared)

    def due_at(self, event: object) -> datetime | None:
        """When it is due, before `within` is added; None: from now. Raises `InvalidDeadline`."""
        if self.at is None:
            return None
        due = self.at(event)
        if not isinstance(due, datetime) or due.tzinfo is None:
            raise InvalidDeadline(
                f"{self.kind} {self} ({self.place}): at=... gave {due!r}, which is no aware datetime"
            )
        return due

    def _refuse_mistakes(self) -> None:
        super()._refuse_mistakes()
        what = f"{self.place}: {self.kind} {self}"
        if not self.rejects:
            raise ConfigurationError(f"{what} needs rejects=..., the event that says it has passed")
        if self.at is None and self.within <= timedelta(0):
            raise ConfigurationError(
                f"{what} leaves no time: minutes=15, hours=..., or at=lambda event: ..."
            )
        if len(self.on) != 1:
            raise ConfigurationError(f"{what} counts from a start or a step, not from a join")


class Start(Reaction[[], None]):
    """A declared start: there is no function to run, as the caller of `start` has done the writing."""

    kind = "start"

    def __init__(
        self, *, owner: Owner, place: Place, event: EventType, nothing_to_undo: str | None
    ) -> None:
        super().__init__(
            _nothing,
            owner=owner,
            name=start_name(event),
            place=place,
            on=(event,),
            nothing_to_undo=nothing_to_undo,
        )

    def _refuse_mistakes(self) -> None:
        check_reason(self.nothing_to_undo, f"{self.place}: {self.kind} {self}")


def old_names(was: str | Iterable[str]) -> tuple[str, ...]:
    """What was given as `was=...`, one name or several."""
    return (was,) if isinstance(was, str) else tuple(was)


def start_name(event: EventType) -> str:
    """What a start is called in the journal; no step can have that name."""
    return f"start:{event.name}"


def event_types(classes: EventClasses, registry: Registry, what: str) -> tuple[EventType, ...]:
    """The event types of *classes*. Raises `ConfigurationError` for one that is not registered, or twice."""
    if classes is None:
        return ()
    found: list[EventType] = []
    for cls in (classes,) if isinstance(classes, type) else tuple(classes):
        try:
            event_type = registry.of_class(cls)
        except (UnregisteredEvent, TypeError) as error:
            raise ConfigurationError(f"{what}: {error}") from error
        if event_type in found:
            raise ConfigurationError(f"{what} names {event_type} twice")
        found.append(event_type)
    return tuple(found)


def _nothing() -> None: ...
