"""Messages that could not be given to a handler at all: unreadable, unknown, not meant for here.

Kept as the exact bytes with the reason, for a person to look at; one row for any number of copies.
What is stored is bounded in the size of each row and in the number of rows, as anyone who can
write to the queue can fill it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid5

from sqlalchemy.orm import Session

from outbox import ordering, pending
from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement, storable

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2 * 1024 * 1024
MAX_ROWS: Final = 100_000
_MAX_REASON = 2_000
_MAX_HEADERS = 8_000
_NAMESPACE = UUID("0191d1a6-5c37-7c1f-9f5e-3f6a1f0c8a55")

_SEEN_AGAIN = """
UPDATE {schema}.quarantine
SET times_seen = times_seen + 1, last_seen = clock_timestamp(), reason = :reason
WHERE service = :service AND digest = :digest RETURNING id
"""
_INSERT = """
INSERT INTO {schema}.quarantine (service, digest, event_id, reason, headers, key_seq, body)
VALUES (:service, :digest, :event_id, :reason, :headers, :key_seq, :body)
ON CONFLICT (service, digest) DO UPDATE SET
    times_seen = {schema}.quarantine.times_seen + 1, last_seen = clock_timestamp()
RETURNING id
"""
_EVICT = """
DELETE FROM {schema}.quarantine WHERE service = :service AND id <= :newest - :max_rows
RETURNING id
"""
_COLUMNS = "id, service, digest, reason, headers, key_seq, body, times_seen, first_seen, last_seen"
_LIST = f"""
SELECT {_COLUMNS} FROM {{schema}}.quarantine
WHERE (CAST(:service AS text) IS NULL OR service = :service) AND id < :before
ORDER BY id DESC LIMIT :limit
"""  # noqa: S608 - a constant list of columns
_SHOW = f"SELECT {_COLUMNS} FROM {{schema}}.quarantine WHERE id = :id"  # noqa: S608
_REMOVE = f"DELETE FROM {{schema}}.quarantine WHERE id = :id RETURNING {_COLUMNS}"  # noqa: S608


@dataclass(frozen=True)
class Quarantined:
    """One message that waits for a person."""

    id: int
    service: str
    digest: bytes
    """SHA-256 of all of the message's bytes, also of those that were cut off."""
    reason: str
    headers: str
    key_seq: int | None
    body: bytes
    times_seen: int
    first_seen: datetime
    last_seen: datetime

    @property
    def is_whole(self) -> bool:
        """Whether the body is all there; one that was cut off cannot be fed through again."""
        return hashlib.sha256(self.body).digest() == self.digest


def put(
    session: Session,
    service: str,
    body: bytes,
    reason: str,
    *,
    headers: Mapping[str, Any] | None = None,
    key_seq: int | None = None,
    event_id: UUID | None = None,
    schema: str = DEFAULT_SCHEMA,
    max_rows: int = MAX_ROWS,
) -> int:
    """Keep a message, in the caller's transaction; returns its id. Copies of one body share a row."""
    if len(body) > MAX_BODY_BYTES:
        reason = f"{reason} (the first {MAX_BODY_BYTES:,} of {len(body):,} bytes are kept)"
    values: dict[str, object] = {
        "service": service,
        "digest": hashlib.sha256(body).digest(),
        "reason": storable(reason, _MAX_REASON),
    }
    seen = session.execute(statement(_SEEN_AGAIN, schema), values).scalar()
    if seen is not None:
        return int(seen)
    values |= {
        "headers": _as_text(headers or {}), "key_seq": key_seq, "body": body[:MAX_BODY_BYTES],
        "event_id": event_id,
    }  # fmt: skip
    newest = int(session.execute(statement(_INSERT, schema), values).scalar_one())
    _evict_oldest(session, service, newest, max_rows, schema)
    return newest


def list_messages(
    session: Session,
    *,
    service: str | None = None,
    before: int | None = None,
    limit: int = 100,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[Quarantined]:
    """Newest first; page on by passing the last id as *before*."""
    rows = session.execute(
        statement(_LIST, schema),
        {"service": service, "before": before if before is not None else 2**62, "limit": limit},
    )
    return [_quarantined(row) for row in rows]


def show(session: Session, id: int, *, schema: str = DEFAULT_SCHEMA) -> Quarantined | None:
    """The message with that id, or None."""
    row = session.execute(statement(_SHOW, schema), {"id": id}).one_or_none()
    return None if row is None else _quarantined(row)


def redrive(session: Session, id: int, *, schema: str = DEFAULT_SCHEMA) -> bool:
    """Feed the message through again, to every handler of its type: after a deploy that can read it.

    The service's sweeper sends it to its own queue soon after the commit; if it still cannot be
    read it comes back here. An event that is older than the dedupe window is run: say so to whoever
    orders it, as nobody can know any more whether it was handled before. False where there is no
    such message, `ValueError` where its body was cut off or is no text.
    """
    message = show(session, id, schema=schema)
    if message is None:
        return False
    _check_can_be_sent(message)
    removed = session.execute(statement(_REMOVE, schema), {"id": id}).one_or_none()
    if removed is None:
        return False
    pending.owe(
        session,
        pending.Owed(
            service=message.service,
            handler=pending.EVERY_HANDLER,
            event_id=redrive_id(message.service, message.body),
            type=pending.UNREAD,
            body=message.body,
            key_seq=message.key_seq,
        ),
        "redrive",
        schema=schema,
    )
    return True


def discard(session: Session, id: int, reason: str, *, schema: str = DEFAULT_SCHEMA) -> bool:
    """Delete the message for good, logging *reason*. False where there is none.

    What waited behind it in the order of its key is delivered.
    """
    row = session.execute(statement(_REMOVE, schema), {"id": id}).one_or_none()
    if row is None:
        return False
    log.warning(
        "quarantined message %d of %s discarded (%s): %s; it was there because %s",
        id, row.service, bytes(row.digest).hex()[:16], reason, row.reason,
    )  # fmt: skip
    ordering.pass_over(session, bytes(row.body), row.key_seq, schema=schema)
    return True


def redrive_id(service: str, body: bytes) -> UUID:
    """The id under which a message is owed whose own id nobody could read."""
    return uuid5(_NAMESPACE, f"{service}:{hashlib.sha256(body).hexdigest()}")


def _check_can_be_sent(message: Quarantined) -> None:
    if not message.is_whole:
        raise ValueError(f"message {message.id} was cut off when it was stored; discard it")
    try:
        message.body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"message {message.id} is no UTF-8 text, so no release can read it; discard it"
        ) from error


def _evict_oldest(session: Session, service: str, newest: int, max_rows: int, schema: str) -> None:
    evicted = session.execute(
        statement(_EVICT, schema), {"service": service, "newest": newest, "max_rows": max_rows}
    ).all()
    if evicted:
        log.error(
            "quarantine of %s is full (%d messages): the %d oldest were deleted",
            service, max_rows, len(evicted),
        )  # fmt: skip


def _as_text(headers: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(headers, default=repr, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that JSON has no word for, or a cycle
        text = repr(headers)
    return storable(text, _MAX_HEADERS)


def _quarantined(row: Any) -> Quarantined:
    return Quarantined(**{**row._mapping, "digest": bytes(row.digest), "body": bytes(row.body)})
