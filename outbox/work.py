"""One event for one handler: what is to be done, within which limits, and what can become of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import cached_property
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox import pending
from outbox.envelope import Envelope
from outbox.places import Place
from outbox.service import Handler, Service

LIMIT: Final = """
SELECT set_config('lock_timeout', :lock, true) AS lock,
    set_config('idle_in_transaction_session_timeout', :idle, true) AS idle,
    set_config('statement_timeout', :statement, true) AS statement
"""
"""Imposes `TransactionLimits.parameters` on a transaction."""


class Outcome(StrEnum):
    """What became of one delivery. In each case it is settled in the database and can be acked."""

    HANDLED = "handled"
    DUPLICATE = "duplicate"
    """Its effect was committed before."""
    OWED = "owed"
    """A retry of it is due later; this copy was not needed."""
    RETRY = "retry"
    """It failed; a retry was noted."""
    BUSY = "busy"
    """Another worker is at it; should that one fail, a retry was noted."""
    PARKED = "parked"
    """It is a dead letter, now or from before."""
    STALE = "stale"
    """It was addressed to the handler by a note that is gone: settled or withdrawn meanwhile."""
    EARLY = "early"
    """Others of its key come first; it is owed until its turn has come."""
    QUARANTINED = "quarantined"


class Busy(Exception):
    """Another transaction holds this delivery's key, and did not end within `lock_timeout`."""


@dataclass(frozen=True)
class TransactionLimits:
    """What ends a transaction that hangs, so that a worker that was paused cannot hold up others."""

    lock: timedelta = timedelta(seconds=5)
    """`lock_timeout` of each transaction."""
    idle: timedelta = timedelta(seconds=60)
    """`idle_in_transaction_session_timeout`: the longest a handler may spend between two
    statements; 0 for no limit."""
    statement: timedelta = timedelta(minutes=5)
    """`statement_timeout`: the longest that one statement of a handler may take; 0 for no limit."""
    lease: timedelta = timedelta(seconds=60)
    """How long after an attempt was noted it is taken for lost, and the delivery sent again."""

    @cached_property
    def parameters(self) -> Mapping[str, str]:
        return {
            "lock": _milliseconds(self.lock),
            "idle": _milliseconds(self.idle),
            "statement": _milliseconds(self.statement),
        }

    def impose(self, session: Session) -> None:
        """On the session's transaction, before anything in it can wait for a lock."""
        session.execute(text(LIMIT), self.parameters)


@dataclass(frozen=True)
class Work:
    """One event for one handler."""

    service: Service
    handler: Handler
    envelope: Envelope
    key_seq: int | None = None
    addressed: bool = False
    """It came from a `pending_delivery` row, which must still be there for it to run."""
    limits: TransactionLimits = TransactionLimits()

    @property
    def schema(self) -> str:
        return self.service.schema

    @property
    def pair(self) -> tuple[UUID, str]:
        """The key of its inbox row."""
        return self.envelope.id, self.handler.name

    @property
    def owed(self) -> pending.Owed:
        return pending.Owed(
            service=self.service.name,
            handler=self.handler.name,
            event_id=self.envelope.id,
            type=self.envelope.type,
            body=self.envelope.body,
            key=self.envelope.key,
            key_seq=self.key_seq,
        )

    @property
    def place(self) -> Place | None:
        """Its place in the order of its key; None where its type has no order."""
        envelope = self.envelope
        if self.key_seq is None or envelope.key is None:
            return None
        return Place(
            self.service.name, self.handler.name, envelope.source, envelope.type, envelope.key,
            self.key_seq,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.envelope.type} {self.envelope.id} for {self.handler.name}"


def _milliseconds(duration: timedelta) -> str:
    return f"{int(duration.total_seconds() * 1000)}ms"
