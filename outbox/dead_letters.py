"""Deliveries that a handler failed for good: kept with the traceback until a person decides."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from outbox import inbox, ordering, pending
from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement, storable

log = logging.getLogger(__name__)

_MAX_ERROR = 2_000
_MAX_TRACEBACK = 20_000

_COLUMNS = """
    id, service, handler, event_id, type, key, key_seq, body, attempts, error, traceback, parked_at
"""
# A redriven one that fails again may meet the row of a copy that was parked meanwhile.
_INSERT = """
INSERT INTO {schema}.dead_letter
    (service, handler, event_id, type, key, key_seq, body, attempts, error, traceback)
VALUES (:service, :handler, :event_id, :type, :key, :key_seq, :body, :attempts, :error, :traceback)
ON CONFLICT (handler, event_id) DO UPDATE SET
    attempts = EXCLUDED.attempts, error = EXCLUDED.error, traceback = EXCLUDED.traceback,
    parked_at = clock_timestamp()
"""
# Every filter that is not given is passed over.
_MATCHING = """
    (CAST(:id AS bigint) IS NULL OR id = :id)
    AND (CAST(:service AS text) IS NULL OR service = :service)
    AND (CAST(:handler AS text) IS NULL OR handler = :handler)
    AND (CAST(:type AS text) IS NULL OR type = :type)
    AND (CAST(:key AS text) IS NULL OR key = :key)
"""
_HELD_UP = """
    (SELECT count(*) FROM {schema}.pending_delivery AS owed
     WHERE owed.handler = letter.handler AND owed.type = letter.type AND owed.key = letter.key
         AND owed.reason = 'early' AND owed.key_seq > letter.key_seq) AS held_up
"""
_LIST = f"""
SELECT {_COLUMNS}, {_HELD_UP} FROM {{schema}}.dead_letter AS letter
WHERE {_MATCHING} AND id < :before ORDER BY id DESC LIMIT :limit
"""  # noqa: S608 - constant text
_COUNT = f"SELECT count(*) FROM {{schema}}.dead_letter WHERE {_MATCHING}"  # noqa: S608
_REMOVE = f"""
DELETE FROM {{schema}}.dead_letter WHERE id IN (
    SELECT id FROM {{schema}}.dead_letter WHERE {_MATCHING}
    ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
) RETURNING {_COLUMNS}
"""  # noqa: S608
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class DeadLetter:
    """One delivery that waits for a person."""

    id: int
    service: str
    handler: str
    event_id: UUID
    type: str
    key: str | None
    key_seq: int | None
    body: bytes
    """The envelope's exact bytes."""
    attempts: int
    error: str
    traceback: str
    parked_at: datetime
    held_up: int = 0
    """How many deliveries were seen waiting behind it, in the order of its key."""


@dataclass(frozen=True)
class Matching:
    """Which dead letters are meant; what is None does not matter."""

    id: int | None = None
    service: str | None = None
    handler: str | None = None
    type: str | None = None
    key: str | None = None

    @property
    def is_everything(self) -> bool:
        return self == Matching()


def park(
    session: Session,
    owed: pending.Owed,
    attempts: int,
    error: str,
    traceback: str,
    *,
    schema: str = DEFAULT_SCHEMA,
) -> None:
    """Set the delivery aside, in the caller's transaction; nothing is owed any more."""
    session.execute(
        statement(_INSERT, schema),
        {
            "service": owed.service,
            "handler": owed.handler,
            "event_id": owed.event_id,
            "type": owed.type,
            "key": owed.key,
            "key_seq": owed.key_seq,
            "body": owed.body,
            "attempts": attempts,
            "error": storable(error, _MAX_ERROR),
            "traceback": storable(traceback, _MAX_TRACEBACK),
        },
    )
    pending.withdraw(session, owed.handler, owed.event_id, schema=schema)


def list_letters(
    session: Session,
    matching: Matching = Matching(),
    *,
    before: int | None = None,
    limit: int = 100,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[DeadLetter]:
    """Newest first; page on by passing the last id as *before*."""
    values = {**vars(matching), "before": 2**62 if before is None else before, "limit": limit}
    return [_letter(row) for row in session.execute(statement(_LIST, schema), values)]


def count(
    session: Session,
    matching: Matching = Matching(),
    *,
    schema: str = DEFAULT_SCHEMA,
) -> int:
    """How many there are: what a bulk redrive or discard would touch."""
    return int(session.execute(statement(_COUNT, schema), vars(matching)).scalar_one())


def show(session: Session, id: int, *, schema: str = DEFAULT_SCHEMA) -> DeadLetter | None:
    """The dead letter with that id, or None."""
    return next(iter(list_letters(session, Matching(id=id), schema=schema)), None)


def redrive(
    session: Session,
    matching: Matching,
    *,
    limit: int | None = None,
    schema: str = DEFAULT_SCHEMA,
) -> int:
    """Give them to their handlers again, with all attempts before them; returns how many.

    The service's sweeper sends them soon after the commit, oldest first.
    """
    letters = _remove(session, matching, limit, schema)
    for letter in letters:
        pending.owe(session, _owed(letter), "redrive", error=letter.error, schema=schema)
    return len(letters)


def discard(
    session: Session,
    matching: Matching,
    reason: str,
    *,
    limit: int | None = None,
    schema: str = DEFAULT_SCHEMA,
) -> int:
    """Delete them for good, each logged with *reason*; returns how many.

    What waited behind one in the order of its key is delivered.
    """
    letters = _remove(session, matching, limit, schema)
    for letter in letters:
        log.warning(
            "dead letter %d discarded (%s): event %s %s for %s, which failed with %s",
            letter.id, reason, letter.type, letter.event_id, letter.handler, letter.error,
        )  # fmt: skip
        # A copy that comes later, of a replay say, is a duplicate.
        digest = hashlib.sha256(letter.body).digest()
        inbox.first_delivery(session, letter.event_id, letter.handler, digest, schema=schema)
        ordering.pass_over(session, letter.body, letter.key_seq, letter.handler, schema=schema)
    return len(letters)


def _remove(
    session: Session, matching: Matching, limit: int | None, schema: str
) -> Sequence[DeadLetter]:
    values = {**vars(matching), "limit": _NO_LIMIT if limit is None else limit}
    rows = session.execute(statement(_REMOVE, schema), values)
    return sorted((_letter(row) for row in rows), key=lambda letter: letter.id)


def _owed(letter: DeadLetter) -> pending.Owed:
    return pending.Owed(
        service=letter.service,
        handler=letter.handler,
        event_id=letter.event_id,
        type=letter.type,
        body=letter.body,
        key=letter.key,
        key_seq=letter.key_seq,
    )


def _letter(row: Any) -> DeadLetter:
    return DeadLetter(**{**row._mapping, "body": bytes(row.body)})
