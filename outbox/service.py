"""A service: its name, its queue, and which of its handlers takes which event.

    orders = Service("orders")

    @orders.on(StockReserved)
    def confirm(event: StockReserved, session: Session) -> None: ...

A handler's name is part of the inbox key, so it must outlive refactorings: it is
`<service>.<function>` unless given, and renaming it makes every event in flight new to it.
Everything that can be wired wrongly is refused at import.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from outbox import publishing
from outbox.envelope import Envelope
from outbox.errors import ConfigurationError, UnregisteredEvent
from outbox.events import EventType, Registry
from outbox.events import registry as default_registry
from outbox.sql import DEFAULT_SCHEMA, checked_identifier

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

_SERVICE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_HANDLER_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,200}")

EventHandler = Callable[[Any, "Session"], None]
BatchHandler = Callable[[list[Any], "Session"], None]
F = TypeVar("F", bound=EventHandler)
B = TypeVar("B", bound=BatchHandler)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a failing handler is tried, and how long it waits in between."""

    attempts: int = 8
    """Runs before the delivery is parked as a dead letter; one that killed its worker counts."""
    first: timedelta = timedelta(seconds=1)
    """Upper bound of the wait after the first failure; it doubles with every further one."""
    cap: timedelta = timedelta(minutes=10)
    """Upper bound of any wait."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first < timedelta(0) or self.cap < self.first:
            raise ConfigurationError(f"{self}: attempts must be 1 or more, and 0 <= first <= cap")

    def delay(self, attempt: int, random: Random) -> timedelta:
        """How long to wait after failed run number *attempt* (from 1): anything up to the bound.

        Full jitter: handlers that failed together do not come back together.
        """
        doublings = min(max(attempt, 1) - 1, 63)
        bound = min(self.cap.total_seconds(), self.first.total_seconds() * 2**doublings)
        return timedelta(seconds=bound * random.random())


@dataclass(frozen=True)
class Delivery:
    """One event handed to one handler."""

    envelope: Envelope
    event: Any
    """The payload, read into the class that the registry knows for its type and version."""
    attempt: int
    """Number of this run, from 1."""
    handler: str
    result: Any = None
    """What the call outside of the database came to (see `Handler.prepare`)."""


@dataclass(frozen=True)
class Handler:
    """What is called with events of some types, in one transaction each."""

    name: str
    """Unique in its service and stable: it is half of the inbox key."""
    event_types: frozenset[str]
    run: Callable[[Delivery, Session], None]
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    exhausted: Callable[[Delivery, Session, BaseException], None] | None = None
    """Called in the transaction that sets the delivery aside: parked after its last attempt, or
    quarantined because it cannot be read (its `event` is None then)."""
    versions: frozenset[tuple[str, int]] = frozenset()
    """(type, version) pairs that it can be given; empty: every version the registry can read."""
    subscribes: bool = True
    """False: it takes only what is addressed to it by name (timers, work scheduled for later)."""
    hears_itself: bool = True
    """False: what its own service has published is nothing new to it, and is dropped unread."""
    prepare: Callable[[Delivery, Session], Callable[[], Any] | None] | None = None
    """For what acts outside of the database: run first, in a transaction of its own, at each
    attempt. What it returns is called after that commit, in no transaction, and must not return
    None; `run` then writes the result down, even where the delivery was settled meanwhile, so it
    has to know by itself what it has had. A failed call is a failed attempt."""
    run_all: Callable[[Sequence[Delivery], Session], None] | None = None
    """Called in place of `run` with all of its deliveries of a batch, in their one transaction."""
    defined_at: tuple[str, int] | None = None
    """File and line of the function behind it, where that is known."""

    @property
    def owns_transactions(self) -> bool:
        """Whether it needs transactions of its own, so that no batch can hold it."""
        return self.prepare is not None


class Service:
    """A named subscriber and publisher: one queue, one set of tables, any number of handlers."""

    def __init__(
        self,
        name: str,
        *,
        schema: str = DEFAULT_SCHEMA,
        registry: Registry = default_registry,
        exchange: str = "events",
        queue: str | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """*retry* is for handlers without one of their own. Raises `ConfigurationError`."""
        if not _SERVICE_NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} cannot name a service: lower-case letters, digits, - and _, "
                "beginning with a letter, at most 63 characters"
            )
        self.name = name
        self.schema = checked_identifier(schema)
        self.registry = registry
        self.exchange = exchange
        self.queue = queue or f"{name}.events"
        self.retry = retry or RetryPolicy()
        self._handlers: dict[str, Handler] = {}
        self._published: dict[EventType, tuple[str, int]] = {}

    def publishes(self, *classes: type[Any]) -> None:
        """Say that the service publishes events of *classes* by itself (`publish`).

        Nothing depends on it at run time. Checks, exported contracts and drawings tell by it who
        says what, and compare its schema with that of who listens. Raises `ConfigurationError` for
        a class that is no event.
        """
        caller = sys._getframe(1)
        for cls in classes:
            event_type = self._event_type(cls, "publish")
            self._published.setdefault(event_type, (caller.f_code.co_filename, caller.f_lineno))

    @property
    def published(self) -> Mapping[EventType, tuple[str, int]]:
        """The event types that it is declared to publish by itself, with file and line."""
        return MappingProxyType(self._published)

    def on(
        self,
        *classes: type[Any],
        name: str | None = None,
        retry: RetryPolicy | None = None,
        exhausted: Callable[[Delivery, Session, BaseException], None] | None = None,
    ) -> Callable[[F], F]:
        """Let the decorated `fn(event, session)` handle events of *classes*.

        It runs in the transaction that records the delivery: what it writes through *session*
        is committed once per event, or not at all. Raises `ConfigurationError` at import: no
        class, a class that is no event, a function that does not take two arguments, a name
        that another handler has.
        """
        event_types = [self._event_type(cls, "subscribe") for cls in classes]
        versions = frozenset((event_type.name, event_type.version) for event_type in event_types)

        def register(function: F) -> F:
            _check_callable(function)
            self.add(
                Handler(
                    name=name or f"{self.name}.{function.__name__}",
                    event_types=frozenset(type_name for type_name, _ in versions),
                    run=lambda delivery, session: function(delivery.event, session),
                    retry=retry or self.retry,
                    exhausted=exhausted,
                    versions=versions,
                    defined_at=_definition(function),
                )
            )
            return function

        return register

    def on_batch(
        self,
        *classes: type[Any],
        name: str | None = None,
        retry: RetryPolicy | None = None,
        exhausted: Callable[[Delivery, Session, BaseException], None] | None = None,
    ) -> Callable[[B], B]:
        """Let the decorated `fn(events, session)` handle a list of events of *classes* at once.

        For what is written faster together. Workers started with `--outbox-batch` give it all new
        events of a batch in one call; where that call fails, and in other workers, each event comes
        in a list of its own. What it publishes names no event as its cause. Raises
        `ConfigurationError`, as `on` does.
        """

        def register(function: B) -> B:
            handle = self.on(*classes, name=name, retry=retry, exhausted=exhausted)

            @handle
            @functools.wraps(function)
            def one(event: Any, session: Session) -> None:
                function([event], session)

            def run_all(deliveries: Sequence[Delivery], session: Session) -> None:
                function([delivery.event for delivery in deliveries], session)

            key = name or f"{self.name}.{function.__name__}"
            self._handlers[key] = replace(self._handlers[key], run_all=run_all)
            return function

        return register

    def add(self, handler: Handler) -> None:
        """Add a handler made by hand. Raises `ConfigurationError`, as `on` does."""
        if not _HANDLER_NAME.fullmatch(handler.name):
            raise ConfigurationError(
                f"{handler.name!r} cannot name a handler: "
                "letters, digits and _ . : -, at most 200 characters"
            )
        if not handler.event_types:
            raise ConfigurationError(
                f"handler {handler.name} takes no event: name at least one event class"
            )
        if handler.name in self._handlers:
            raise ConfigurationError(
                f"service {self.name} has two handlers named {handler.name}; "
                "give one of them another name: @service.on(..., name=...)"
            )
        self._handlers[handler.name] = handler

    def handler(self, name: str) -> Handler | None:
        """The handler of that name, or None."""
        return self._handlers.get(name)

    def stand_in(self, name: str) -> Handler:
        """Takes what is owed to a handler that is not in this deployment: it fails, is retried and
        parked. A worker of the next deployment may know it, so it is not given up at once."""

        def run(*_: object) -> None:
            raise LookupError(
                f"no handler is named {name} in this deployment: if it was renamed, give it its old "
                "name (name=...), then redrive"
            )

        return Handler(name=name, event_types=frozenset({"any"}), run=run, retry=self.retry)

    @property
    def handlers(self) -> Sequence[Handler]:
        return tuple(self._handlers.values())

    def handlers_for(self, event_type: str, source: str | None = None) -> Sequence[Handler]:
        """The handlers that an event of that type off the bus is for, in order of registration:
        all that subscribe to it, or those to which one from *source* says something."""
        is_own = source == self.name
        return [
            one
            for one in self._handlers.values()
            if one.subscribes and event_type in one.event_types and (one.hears_itself or not is_own)
        ]

    @property
    def bindings(self) -> list[str]:
        """The event types that the service's queue is bound to, sorted."""
        return sorted({t for h in self._handlers.values() if h.subscribes for t in h.event_types})

    def lock_order(self, envelope: Envelope) -> str:
        """What a batch is sorted by: name here what its handlers lock first, and two batches never
        wait for each other in a circle. By default the event's key."""
        return envelope.key or ""

    def begin_batch(self, deliveries: Sequence[Delivery], session: Session) -> None:
        """Called in the transaction of a batch before its handlers run, with all that they will be
        given: to lock and read at once what each would lock and read for itself."""

    def keep_up(self, engine: Engine, window: timedelta) -> None:
        """Maintain tables of its own: called now and then, in a worker's main process.

        *window* is the dedupe window: an event that is older is not run any more.
        """

    def publish(self, session: Any, event: object) -> UUID:
        """Publish *event* in the transaction of *session*, this service being its source."""
        return publishing.publish(
            session, event, source=self.name, registry=self.registry, schema=self.schema
        )

    def publish_all(self, session: Any, events: Iterable[object]) -> list[UUID]:
        """Publish *events* in one statement, in their order."""
        return publishing.publish_all(
            session, events, source=self.name, registry=self.registry, schema=self.schema
        )

    def _event_type(self, cls: type[Any], what: str) -> EventType:
        try:
            return self.registry.of_class(cls)
        except UnregisteredEvent as error:
            raise ConfigurationError(f"service {self.name} cannot {what}: {error}") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def _definition(function: Callable[..., Any]) -> tuple[str, int] | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else (code.co_filename, code.co_firstlineno)


def _check_callable(function: Callable[..., Any]) -> None:
    where = f"{function.__module__}.{function.__qualname__}"
    if inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"handler {where} is async; Celery workers run plain functions")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        raise ConfigurationError(f"handler {where} must take (event, session)") from None
