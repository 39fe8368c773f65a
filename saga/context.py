"""Which saga the code that runs right now works for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

SAGA_ID = "sagaid"
"""The CloudEvents attribute that carries a saga's id on each of its events."""


class Emission(NamedTuple):
    """An event that a run of a step has published as part of its saga."""

    event_id: UUID
    type: str


@dataclass(frozen=True, slots=True)
class CurrentSaga:
    """The saga and the run of a step that a user's function is called for."""

    saga_id: UUID
    participant: str
    step: str
    trigger_id: UUID
    compensating: bool = False
    published: list[Emission] = field(default_factory=list, compare=False)
    """What the user's function has published so far, beside the event that it returns."""

    @property
    def idempotency_key(self) -> str:
        """The same over every redelivery and retry of this run, and no other's: for calls outside."""
        verb = "undo" if self.compensating else "do"
        return f"{self.saga_id}/{self.participant}.{self.step}/{self.trigger_id}/{verb}"


_current: ContextVar[CurrentSaga | None] = ContextVar("saga.current", default=None)


def current() -> CurrentSaga | None:
    """The saga being worked for; None outside of steps, joins and compensations."""
    return _current.get()


@contextmanager
def working_for(saga: CurrentSaga) -> Iterator[CurrentSaga]:
    """Make *saga* the current one inside the block."""
    token = _current.set(saga)
    try:
        yield saga
    finally:
        _current.reset(token)
