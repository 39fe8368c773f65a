"""What participants have declared, as plain data: who reacts to what, with what, and how it is undone.

`Participant.spec` makes it from the decorators. Checks, drawings and exported contracts read this
and need neither the code behind it nor a database.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from outbox.events import EventType

Exhausted = Literal["stuck", "abort"]

_DECLARING_MODULES: Final = frozenset(
    {"saga.choreography", "saga.declaration", "saga.declaring", "saga.participant"}
)


@dataclass(frozen=True, order=True)
class Place:
    """Where in the source something is declared."""

    file: str
    line: int

    @classmethod
    def of_caller(cls) -> Place:
        """The line outside of this package that called into it."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__") in _DECLARING_MODULES:
            frame = frame.f_back
        return cls(frame.f_code.co_filename, frame.f_lineno)

    @classmethod
    def of_function(cls, function: Callable[..., Any]) -> Place:
        """Where *function* begins; its module, where that cannot be told."""
        code = getattr(function, "__code__", None)
        if code is None:
            return cls(getattr(function, "__module__", repr(function)), 0)
        return cls(code.co_filename, code.co_firstlineno)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, order=True)
class EventRef:
    """An event type by its name and version."""

    name: str
    version: int

    @classmethod
    def to(cls, event_type: EventType) -> EventRef:
        return cls(event_type.name, event_type.version)

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"


@dataclass(frozen=True)
class Plain:
    """An event that a service takes or publishes outside of its steps and joins."""

    event: EventRef
    place: Place | None = None


@dataclass(frozen=True)
class StartSpec:
    """An event that opens a saga."""

    participant: str
    event: EventRef
    place: Place
    compensation: Place | None = None
    nothing_to_undo: str | None = None


@dataclass(frozen=True)
class StepSpec:
    """A local transaction in answer to one event."""

    participant: str
    name: str
    on: EventRef
    emits: tuple[EventRef, ...]
    """It answers with exactly one of these; empty: with none."""
    rejects: tuple[EventRef, ...]
    place: Place
    compensation: Place | None = None
    nothing_to_undo: str | None = None
    exhausted: Exhausted = "stuck"
    """What becomes of the saga when the step's attempts are used up."""
    was: tuple[str, ...] = ()
    """Names that it had before."""
    external: bool = False
    """Whether it acts outside of the database."""
    resolves: bool = False
    """Whether an external step can find out what came of a call without a result."""
    pivot: bool = False
    """Whether its commit decides the saga: from there it only goes forward."""
    retriable: bool = False
    """Whether it comes after the pivot: it never rejects and is never undone."""
    opens: EventRef | None = None
    """The event of another saga that it starts, and whose end it waits for."""
    delay_seconds: float | None = None
    """How long after its event it runs; None: at once."""
    no_deadline: str | None = None
    """Of a pivot: why it may wait for ever."""


@dataclass(frozen=True)
class JoinSpec:
    """A local transaction in answer to several events, once all of them are there."""

    participant: str
    name: str
    on: tuple[EventRef, ...]
    emits: tuple[EventRef, ...]
    rejects: tuple[EventRef, ...]
    completes: bool
    """Whether its commit decides that the saga is completed."""
    place: Place
    compensation: Place | None = None
    nothing_to_undo: str | None = None
    exhausted: Exhausted = "stuck"
    was: tuple[str, ...] = ()
    needs: int | None = None
    """How many of its events it waits for; None: all."""
    no_deadline: str | None = None
    """Of one that completes: why it may wait for ever."""


@dataclass(frozen=True)
class DeadlineSpec:
    """A point in time at which a saga that is not decided is aborted."""

    participant: str
    name: str
    on: EventRef
    """The event of the start or step that it counts from."""
    after: str
    """Name of that start or step."""
    within_seconds: float | None
    """None: the event itself says when."""
    rejects: tuple[EventRef, ...]
    place: Place

    def __str__(self) -> str:
        return f"{self.participant}.{self.name}"


@dataclass(frozen=True)
class ParticipantSpec:
    """One participant's part in the choreography."""

    name: str
    starts: tuple[StartSpec, ...]
    steps: tuple[StepSpec, ...]
    joins: tuple[JoinSpec, ...]
    deadlines: tuple[DeadlineSpec, ...] = ()
