"""Deliveries owed to one handler later: retries, timers, redrives. The rows; `sweeper.py` sends them.

A row is written in the transaction that decides that the delivery is still owed, and leaves in the
one that settles it. Between the two it is sent to the service's own queue whenever it is due, so
a message that is lost on the way is simply sent again. Nothing here rests on Celery's retries,
ETAs or countdowns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.connections import executor
from outbox.envelope import Envelope
from outbox.sql import DEFAULT_SCHEMA, in_schema
from outbox.statements import fetch, storable

Reason = Literal["retry", "crash", "redrive", "timer", "early"]

EVERY_HANDLER: Final = "*"
"""Stands for the handler where a quarantined message is fed through again."""
UNREAD: Final = "outbox.unread"
"""Stands for the type of a message that nobody could read."""

DUE_AT_ONCE: Final = "outbox.due_at_once"
"""Key in `session.info`: something was scheduled for now, so the sweeper should look now."""

_MAX_ERROR = 2_000
_AT_ONCE = timedelta(0)

_COLUMNS = """
    service, handler, event_id, type, key, key_seq, body, reason, attempts, sends,
    next_attempt_at, error, created_at
"""
_INSERT = """
INSERT INTO {schema}.pending_delivery
    (service, handler, event_id, type, key, key_seq, body, reason, attempts, next_attempt_at, error)
VALUES (:service, :handler, :event_id, :type, :key, :key_seq, :body, :reason, :attempts,
    clock_timestamp() + :delay, :error)
"""
_INSERT_IF_ABSENT = f"{_INSERT} ON CONFLICT (handler, event_id) DO NOTHING RETURNING true"
_SCHEDULE = """
INSERT INTO {schema}.pending_delivery
    (service, handler, event_id, type, key, body, reason, attempts, next_attempt_at)
VALUES (%s, %s, %s, %s, %s, %s, 'timer', 0,
    COALESCE(CAST(%s AS timestamptz), clock_timestamp()) + CAST(%s AS interval))
ON CONFLICT (handler, event_id) DO NOTHING RETURNING true
"""
# In one order, lest two that owe the same wait for each other.
_SCHEDULE_ALL = """
INSERT INTO {schema}.pending_delivery
    (service, handler, event_id, type, key, body, reason, attempts, next_attempt_at)
SELECT %s, handler, event_id, type, key, body, 'timer', 0,
    COALESCE(due_at, clock_timestamp()) + delay
FROM unnest(%b::text[], %b::uuid[], %b::text[], %b::text[], %b::bytea[], %b::timestamptz[],
    %b::interval[]) AS owed (handler, event_id, type, key, body, due_at, delay)
ORDER BY handler, event_id
ON CONFLICT (handler, event_id) DO NOTHING
"""
_UPSERT = f"""{_INSERT}
ON CONFLICT (handler, event_id) DO UPDATE SET
    reason = EXCLUDED.reason, attempts = EXCLUDED.attempts, sends = 0,
    next_attempt_at = EXCLUDED.next_attempt_at, error = EXCLUDED.error
"""
_BEGIN_ATTEMPT = """
UPDATE {schema}.pending_delivery
SET attempts = attempts + 1, sends = 0, next_attempt_at = clock_timestamp() + :lease
WHERE handler = :handler AND event_id = :event_id RETURNING attempts, error
"""
_DELETE = """
DELETE FROM {schema}.pending_delivery WHERE handler = :handler AND event_id = :event_id
RETURNING true
"""
# Each time it is sent it waits twice as long: a backlog in the queue must not be added to.
_CLAIM_DUE = """
WITH due AS MATERIALIZED (
    SELECT handler, event_id, next_attempt_at AS due_at FROM {schema}.pending_delivery
    WHERE service = :service AND next_attempt_at <= clock_timestamp()
    ORDER BY next_attempt_at LIMIT :limit
    FOR UPDATE SKIP LOCKED
)
UPDATE {schema}.pending_delivery AS owed
SET sends = sends + 1, next_attempt_at =
    clock_timestamp() + LEAST(:resend_after * power(2, LEAST(sends, 20)), :resend_cap)
FROM due WHERE owed.handler = due.handler AND owed.event_id = due.event_id
RETURNING owed.*, due.due_at
"""
_UNTIL_DUE = """
SELECT min(next_attempt_at) - clock_timestamp() FROM {schema}.pending_delivery
WHERE service = :service
"""
_LIST = f"""
SELECT {_COLUMNS} FROM {{schema}}.pending_delivery
WHERE (CAST(:service AS text) IS NULL OR service = :service)
ORDER BY next_attempt_at LIMIT :limit
"""  # noqa: S608


@dataclass(frozen=True)
class Owed:
    """One event that one handler is owed."""

    service: str
    handler: str
    event_id: UUID
    type: str
    body: bytes
    """The envelope's exact bytes."""
    key: str | None = None
    key_seq: int | None = None


@dataclass(frozen=True)
class PendingDelivery(Owed):
    """A stored `Owed`."""

    reason: str = "retry"
    attempts: int = 0
    """Runs that were begun."""
    sends: int = 0
    """Times it was sent to the queue since the last run was begun."""
    next_attempt_at: datetime | None = None
    error: str | None = None
    created_at: datetime | None = None


@dataclass(frozen=True)
class Noted:
    """An attempt that was noted before it began."""

    number: int
    """From 1."""
    error: str | None = None
    """What the attempt before it failed with, if that was heard."""


def schedule(
    connection: Any,
    service: str,
    handler: str,
    envelope: Envelope,
    due_at: datetime | None = None,
    *,
    delay: timedelta = _AT_ONCE,
    schema: str = DEFAULT_SCHEMA,
) -> bool:
    """Deliver *envelope* to *handler* *delay* after *due_at* (aware; None: now, by the clock of the
    database), in the transaction of *connection*, which is whatever `publish` takes.

    The handler runs as for any event: once in effect, retried, parked after its last attempt. It
    need not subscribe to the type. False, and nothing is changed, where the same event is owed to
    that handler already; one that this handler has had before is dropped when it is due.
    """
    if due_at is not None and due_at.tzinfo is None:
        raise ValueError(f"due_at {due_at} has no zone; use an aware datetime")
    _ring_if_due(connection, due_at, delay)
    owed = (service, handler, envelope.id, envelope.type, envelope.key, envelope.body)
    sql = in_schema(_SCHEDULE, schema)
    return bool(executor(connection)(sql, (*owed, due_at, delay), True))


def schedule_all(
    session: Session,
    service: str,
    owed: Sequence[tuple[str, Envelope, datetime | None, timedelta]],
    *,
    schema: str = DEFAULT_SCHEMA,
) -> None:
    """As `schedule`, for many: handler, envelope, due_at and delay of each."""
    rows = []
    for handler, envelope, due_at, delay in owed:
        _ring_if_due(session, due_at, delay)
        event = (envelope.id, envelope.type, envelope.key, envelope.body)
        rows.append((handler, *event, due_at, delay))
    columns = [list(column) for column in zip(*rows, strict=True)]
    executor(session)(in_schema(_SCHEDULE_ALL, schema), (service, *columns), False)


def _ring_if_due(connection: Any, due_at: datetime | None, delay: timedelta) -> None:
    if due_at is None and not delay and isinstance(connection, Session):
        connection.info[DUE_AT_ONCE] = True


def withdraw(
    session: Session, handler: str, event_id: UUID, *, schema: str = DEFAULT_SCHEMA
) -> bool:
    """The delivery is owed no longer: settled, or cancelled. A copy under way is dropped unrun."""
    key = {"handler": handler, "event_id": event_id}
    return bool(fetch(session, _DELETE, key, schema))


def owe(
    session: Session,
    owed: Owed,
    reason: Reason,
    *,
    delay: timedelta = _AT_ONCE,
    attempts: int = 0,
    error: str | None = None,
    schema: str = DEFAULT_SCHEMA,
) -> None:
    """Note that the delivery is owed after *delay*, *attempts* having been made, or change that."""
    values = _values(owed, reason, delay=delay, attempts=attempts, error=error)
    fetch(session, _UPSERT, values, schema)


def owe_first_attempt(
    session: Session, owed: Owed, lease: timedelta, *, schema: str = DEFAULT_SCHEMA
) -> bool:
    """Note that a first attempt begins, due again after *lease*; False where it is owed already."""
    values = _values(owed, "crash", delay=lease, attempts=1)
    return bool(fetch(session, _INSERT_IF_ABSENT, values, schema))


def begin_attempt(
    session: Session,
    handler: str,
    event_id: UUID,
    lease: timedelta,
    *,
    schema: str = DEFAULT_SCHEMA,
) -> Noted | None:
    """Note that another attempt begins; None where nothing is owed.

    If nothing more is heard of it, it is sent again after *lease*.
    """
    values = {"handler": handler, "event_id": event_id, "lease": lease}
    for row in fetch(session, _BEGIN_ATTEMPT, values, schema):
        return Noted(row.attempts, row.error)
    return None


def claim_due(
    session: Session,
    service: str,
    *,
    limit: int,
    resend_after: timedelta,
    resend_cap: timedelta,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[PendingDelivery]:
    """Take what is due, longest first, putting it off for the next *resend_after* at least."""
    values = {
        "service": service,
        "limit": limit,
        "resend_after": resend_after,
        "resend_cap": resend_cap,
    }
    rows = fetch(session, _CLAIM_DUE, values, schema)
    return [_pending(row) for row in sorted(rows, key=lambda row: row.due_at)]


def until_due(session: Session, service: str, *, schema: str = DEFAULT_SCHEMA) -> timedelta | None:
    """How long until the next one is due (negative: overdue); None where nothing is owed."""
    for (wait,) in fetch(session, _UNTIL_DUE, {"service": service}, schema):
        return wait  # type: ignore[no-any-return]
    return None


def list_pending(
    session: Session,
    *,
    service: str | None = None,
    limit: int = 100,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[PendingDelivery]:
    """What is owed, the next due first."""
    rows = fetch(session, _LIST, {"service": service, "limit": limit}, schema)
    return [_pending(row) for row in rows]


def _values(
    owed: Owed,
    reason: Reason,
    *,
    delay: timedelta = _AT_ONCE,
    attempts: int = 0,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "service": owed.service,
        "handler": owed.handler,
        "event_id": owed.event_id,
        "type": owed.type,
        "key": owed.key,
        "key_seq": owed.key_seq,
        "body": owed.body,
        "reason": reason,
        "delay": delay,
        "attempts": attempts,
        "error": None if error is None else storable(error, _MAX_ERROR),
    }


def _pending(row: Any) -> PendingDelivery:
    columns = {name: value for name, value in row._asdict().items() if name != "due_at"}
    return PendingDelivery(**{**columns, "body": bytes(row.body)})
