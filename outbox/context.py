"""What is being handled right now, so that events published by a handler say what caused them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from outbox.envelope import Envelope


@dataclass(frozen=True, slots=True)
class Handling:
    """The event that a handler has been given, and the service that the handler belongs to."""

    envelope: Envelope
    service: str | None = None


_current: ContextVar[Handling | None] = ContextVar("outbox.handling", default=None)


current: Final = _current.get
"""The event being handled; None outside of handlers."""


@contextmanager
def handling(envelope: Envelope, service: str | None = None) -> Iterator[None]:
    """Make *envelope* the cause of what is published inside the block."""
    token = _current.set(Handling(envelope, service))
    try:
        yield
    finally:
        _current.reset(token)
