"""Holes: events that their source sent, that one handler was not given in time, and that are asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy.orm import Session

from outbox import ordering
from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement

log = logging.getLogger(__name__)

_LIST: Final = """
SELECT handler, event_id, service, type, log, lane, position, noticed_at, asks,
    CASE WHEN gone_at IS NULL THEN next_ask_at END AS next_ask_at, gone_at
FROM {schema}.awaited
WHERE asks > 0 AND (CAST(:service AS text) IS NULL OR service = :service)
ORDER BY noticed_at, event_id LIMIT :limit
"""
_FORGET: Final = """
DELETE FROM {schema}.awaited
WHERE gone_at IS NOT NULL AND (CAST(:service AS text) IS NULL OR service = :service)
RETURNING handler, type, event_id
"""


@dataclass(frozen=True)
class Hole:
    """One event that one handler misses."""

    handler: str
    event_id: UUID
    service: str
    type: str
    log: UUID
    """The source's log (`outbox_log`)."""
    lane: int
    position: int
    noticed_at: datetime
    asks: int
    next_ask_at: datetime | None
    """None: nobody has it any more."""
    gone_at: datetime | None
    """When the source said that its log has it no more."""


def list_holes(
    session: Session,
    *,
    service: str | None = None,
    limit: int = 100,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[Hole]:
    """What is missed, longest first."""
    rows = session.execute(statement(_LIST, schema), {"service": service, "limit": limit})
    return [Hole(**row._mapping) for row in rows]


@dataclass(frozen=True)
class Forgotten:
    """What is missed no longer."""

    events: int
    keys: int
    """Ordered keys that had waited for them, and go on."""


def forget_gone(
    session: Session, reason: str, *, service: str | None = None, schema: str = DEFAULT_SCHEMA
) -> Forgotten:
    """Miss no longer what no log has any more, each logged with *reason*.

    Ordered keys that waited for one of them go on: those that wait for a number of which nothing is
    known here, while nothing else of the type is missed.
    """
    rows = session.execute(statement(_FORGET, schema), {"service": service}).all()
    for row in rows:
        log.warning(
            "not missed any more (%s): %s %s for %s", reason, row.type, row.event_id, row.handler
        )
    keys = ordering.pass_over_lost(session, service=service, schema=schema)
    return Forgotten(len(rows), keys)
