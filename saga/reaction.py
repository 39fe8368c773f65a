"""What every declaration has: its names, events and functions, and the mistakes refused at import."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar

from outbox.errors import ConfigurationError
from outbox.events import EventType, Registry
from saga.choreography import Exhausted, Place
from saga.errors import UndeclaredEvent

if TYPE_CHECKING:
    from saga.declaration import Deadline

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., None])
F_ = TypeVar("F_", bound=Callable[..., Any])

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
        no_deadline: str | None = None,
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
        self.no_deadline = no_deadline
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
        if self.is_never_undone:
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
        check_parameters(function, self._undo_parameters(), f"{place}: the compensation of {self}")
        self.undo, self.undo_place = function, place
        return function

    @property
    def is_never_undone(self) -> bool:
        """Whether its saga only goes forward once it is done."""
        return self.retriable

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
        check_reason(self.nothing_to_undo, what)
        check_reason(self.no_deadline, what, "no_deadline")
        if self.no_deadline is not None and not self.completes:
            raise ConfigurationError(f"{what} decides no saga, so no_deadline says nothing here")
        check_parameters(self.function, self._parameters(), what)
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


def check_reason(reason: str | None, what: str, name: str = "nothing_to_undo") -> None:
    if reason is not None and not reason.strip():
        raise ConfigurationError(f"{what}: {name} needs the reason, in words")


def check_parameters(function: Callable[..., Any], names: list[str], what: str) -> None:
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
