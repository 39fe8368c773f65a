"""Intake: what a broker handed out, read up to the point where handlers could be run.

Everything that can be wrong with a message by itself is found here, before any transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from uuid import UUID

from outbox.envelope import Envelope, decode
from outbox.errors import MalformedMessage, UnknownEventType
from outbox.events import Registry
from outbox.ids import created_at
from outbox.limits import Limits
from outbox.service import Handler, Service


@dataclass(frozen=True)
class Incoming:
    """A message as it came: an envelope's bytes, and what the broker said beside them."""

    body: bytes = field(repr=False)
    handler: str | None = None
    """The one handler that it is addressed to; None for all that subscribe to its type."""
    key_seq: int | None = None
    """Its number in the order of its key, from 1; None where its type has no order."""
    redelivered: bool = False
    """The broker has handed it out before, so it may have killed a worker."""
    headers: Mapping[str, Any] | None = None
    """Kept with the message if it is quarantined."""


def id_in(body: bytes, limits: Limits) -> UUID | None:
    """The id of the event in *body*, if it is one at all."""
    try:
        return decode(body, limits).id
    except MalformedMessage:
        return None


@dataclass
class Payload:
    """The payload object, made when the first handler is about to run, once for all of them."""

    envelope: Envelope
    registry: Registry

    @cached_property
    def event(self) -> Any:
        return self.registry.read(self.envelope.type, self.envelope.version, self.envelope.data)

    def read_for(self, handler: Handler) -> Any:
        """Raises `MalformedMessage` where it cannot be read, or not into what *handler* takes."""
        if handler.versions:
            read_as = self.registry.of(self.event)
            if (read_as.name, read_as.version) not in handler.versions:
                taken = sorted(v for name, v in handler.versions if name == read_as.name)
                raise UnknownEventType(
                    f"{handler.name} takes {read_as.name} in versions {taken}, not in "
                    f"{read_as.version}: add an upcaster from it, or subscribe to it"
                )
        return self.event

    def read_or_none(self) -> Any:
        try:
            return self.event
        except MalformedMessage:
            return None


@dataclass(frozen=True)
class Intake:
    """Reads the messages of one service."""

    service: Service
    limits: Limits
    dedupe_window: timedelta
    now: Callable[[], datetime]

    def read(
        self, message: Incoming, *, is_redriven: bool = False
    ) -> tuple[Envelope, Sequence[Handler]]:
        """The envelope, and the handlers it is for. Raises `MalformedMessage`.

        *is_redriven*: a person asked for it, so it may be older than what the inbox remembers.
        """
        envelope = decode(message.body, self.limits)
        if message.handler:
            return envelope, [self._named(message.handler)]
        handlers = self._subscribed(envelope)
        if not is_redriven:
            self._refuse_forgotten(envelope)
        return envelope, handlers

    def _named(self, name: str) -> Handler:
        return self.service.handler(name) or self.service.stand_in(name)

    def _subscribed(self, envelope: Envelope) -> Sequence[Handler]:
        handlers = self.service.handlers_for(envelope.type, envelope.source)
        if not handlers and not self.service.handlers_for(envelope.type):
            raise UnknownEventType(
                f"no handler of service {self.service.name} takes {envelope.type!r}; "
                f"it takes: {', '.join(self.service.bindings) or 'nothing'}"
            )
        return handlers

    def _refuse_forgotten(self, envelope: Envelope) -> None:
        born = created_at(envelope.id) or envelope.time
        if self.now() - born > self.dedupe_window:
            raise MalformedMessage(
                f"event {envelope.type} {envelope.id} is of {born:%Y-%m-%d}, beyond the dedupe "
                f"window of {self.dedupe_window.days} days: nobody knows any more whether "
                "it was handled"
            )
