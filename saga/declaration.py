"""A declared step, join or start: its events, its functions, and the mistakes that are refused at import."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Generic, ParamSpec, TypeVar

from outbox.errors import ConfigurationError, UnregisteredEvent
from outbox.events import EventType, Registry
from saga.choreography import Exhausted, Place
from saga.errors import InvalidDeadline, UndeclaredEvent

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., None])
F_ = TypeVar("F_", bound=Callable[..., Any])

EventClasses = type[Any] | Iterable[type[Any]] | None

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")
_EXHAUSTED: Final = ("stuck", "abort")


class Reject(Exception):
    """Raised by a step to say no: a business answer, which aborts the saga.

    What the step has written is rolled back, *event* (one of the step's `rejects`) is published,
    and everyone who acted in the saga undoes it. Any other exception means that the outcome is
    unknown: it is tried again, and compensates nothing. *reason* is for people; by default it is
    the name of the event.
    """

    def __init__(self, event: object, reason: str | None = None) -> None:
        super().__init__(reason or type(event).__name__)
        self.event = event
        self.reason = reason


@dataclass(frozen=True)
class Owner:
    """The participant that a declaration belongs to, as far as a declaration needs it."""

    participant: str
    registry: Registry


class Reaction(Generic[P, R]):
    """One named reaction of a participant: what it runs, and how that is undone.

    It can be called like the function that it decorates, which is how to test that function alone.
    """

    kind = "step"

    def __init__(
        self,
        function: Callable[P, R],
        *,
        owner: Owner,
        name: str,
        place: Place,
        on: tuple[EventType, ...],
        emits: tuple[EventType, ...] = (),
        rejects: tuple[EventType, ...] = (),
        nothing_to_undo: str | None = None,
        exhausted: Exhausted = "stuck",
        completes: bool = False,
        retriable: bool = False,
        delay: timedelta | None = None,
        was: tuple[str, ...] = (),
    ) -> None:
        self.function = function
        self.owner = owner
        self.name = name
        self.place = place
        self.on = on
        self.emits = emits
        self.rejects = rejects
        self.nothing_to_undo = nothing_to_undo
        self.exhausted = exhausted
        self.completes = completes
        self.retriable = retriable
        self.delay = delay
        self.deadlines: list[Deadline[..., Any]] = []
        self.was = was
        self.undo: Callable[..., None] | None = None
        self.undo_place: Place | None = None
        self._refuse_mistakes()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __str__(self) -> str:
        return f"{self.owner.participant}.{self.name}"

    def compensation(self, function: F) -> F:
        """Declare the decorated function as what undoes this.

        It takes the triggering event (of a join: each of them), the emitted event if there is one,
        and the session. It runs in a transaction of its own, once, whenever the saga is aborted
        after this has run. It may fail and is tried again; it cannot reject.
        Raises `ConfigurationError` for a second one, or one that takes other parameters.
        """
        place = Place.of_function(function)
        if self.retriable or (self.completes and isinstance(self, Step)):
            raise ConfigurationError(
                f"{place}: {self.kind} {self} is never undone (at {self.place}): from the pivot on a "
                "saga only goes forward; remove the compensation"
            )
        if self.undo is not None:
            raise ConfigurationError(
                f"{place}: {self.kind} {self} has a compensation already, at {self.undo_place}"
            )
        if self.nothing_to_undo is not None:
            raise ConfigurationError(
                f"{place}: {self.kind} {self} says nothing_to_undo={self.nothing_to_undo!r} "
                f"(at {self.place}); a compensation contradicts that, remove one of the two"
            )
        _check_parameters(function, self._undo_parameters(), f"{place}: the compensation of {self}")
        self.undo, self.undo_place = function, place
        return function

    def name_in(self, handler: str) -> str:
        """Its name in that of a handler: today's, or one that it had before."""
        name = handler.rpartition(".")[2]
        return name if name in self.was else self.name

    def check_answer(self, answer: object) -> None:
        """Raise `UndeclaredEvent` unless *answer* is what the declaration says it emits."""
        if not self.emits:
            if answer is not None:
                raise UndeclaredEvent(
                    f"{self} returned {type(answer).__name__} and declares no emits=... ({self.place})"
                )
        elif not _is_one_of(answer, self.emits):
            raise UndeclaredEvent(
                f"{self} returned {type(answer).__name__}; it declares emits={_names(self.emits)} "
                f"({self.place})"
            )

    def check_rejection(self, event: object) -> None:
        """Raise `UndeclaredEvent` unless the declaration says that it can reject with *event*."""
        if not _is_one_of(event, self.rejects):
            raise UndeclaredEvent(
                f"{self} rejected with {type(event).__name__}; it declares "
                f"rejects={_names(self.rejects)} ({self.place})"
            )

    def _parameters(self) -> list[str]:
        return [*(_parameter(event_type) for event_type in self.on), "session"]

    def _undo_parameters(self) -> list[str]:
        *events, session = self._parameters()
        return [*events, *(["emitted"] if self.emits else []), session]

    def _refuse_mistakes(self) -> None:
        what = f"{self.place}: {self.kind} {self}"
        for name in (self.name, *self.was):
            if not _NAME.fullmatch(name):
                raise ConfigurationError(
                    f"{what}: {name!r} cannot be a name: a letter or _, then letters, digits, _ "
                    "and -, at most 100 characters"
                )
        if len({self.name, *self.was}) <= len(self.was):
            raise ConfigurationError(
                f"{what}: was={self.was!r} names it as it is now, or twice; it is for old names"
            )
        if self.exhausted not in _EXHAUSTED:
            raise ConfigurationError(
                f"{what}: exhausted={self.exhausted!r}; it can be {' or '.join(map(repr, _EXHAUSTED))}"
            )
        _check_reason(self.nothing_to_undo, what)
        _check_parameters(self.function, self._parameters(), what)
        if self.delay is not None and self.delay <= timedelta(0):
            raise ConfigurationError(f"{what}: after={self.delay} is no time to wait")
        if not self.retriable:
            return
        if self.rejects:
            raise ConfigurationError(
                f"{what} is retriable, so it succeeds in the end, and cannot reject: reject before "
                "the pivot"
            )
        if self.completes or self.exhausted != "stuck":
            raise ConfigurationError(
                f"{what} is retriable: it comes after the pivot, and neither decides nor aborts"
            )


class Step(Reaction[P, R]):
    """A declared step. Made by `@participant.step(...)`."""

    is_external = False
    resolver: Callable[..., Any] | None = None
    recorder: Callable[..., None] | None = None

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
        _check_parameters(function, parameters, what)
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
        _check_parameters(function, self._parameters(), what)
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
        _check_reason(self.nothing_to_undo, f"{self.place}: {self.kind} {self}")


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


def _check_reason(nothing_to_undo: str | None, what: str) -> None:
    if nothing_to_undo is not None and not nothing_to_undo.strip():
        raise ConfigurationError(f"{what}: nothing_to_undo needs the reason, in words")


def _check_parameters(function: Callable[..., Any], names: list[str], what: str) -> None:
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"{what} is async; participants run plain functions")
    try:
        inspect.signature(function).bind(*names)
    except TypeError:
        raise ConfigurationError(f"{what} must take ({', '.join(names)})") from None


def _parameter(event_type: EventType) -> str:
    return event_type.name.replace(".", "_")


def _is_one_of(event: object, types: tuple[EventType, ...]) -> bool:
    return any(type(event) is event_type.payload_class for event_type in types)


def _names(types: tuple[EventType, ...]) -> str:
    names = ", ".join(event_type.payload_class.__name__ for event_type in types)
    return f"({names})" if len(types) != 1 else names
