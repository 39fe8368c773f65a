"""The inbox: whether this handler has had this event before.

The row is inserted in the transaction of the handler's own writes, so it exists exactly if they
do. A second delivery that runs at the same time waits on the key until the first has committed
(then it is a duplicate) or rolled back (then it is the first). No unique violation is ever raised
or caught: it would abort the transaction it happened in.
"""

from __future__ import annotations

from enum import Enum, auto
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import fetch

_INSERT = """
INSERT INTO {schema}.inbox (event_id, handler, digest) VALUES (:event_id, :handler, :digest)
ON CONFLICT DO NOTHING RETURNING true
"""
_DIGEST = "SELECT digest FROM {schema}.inbox WHERE event_id = :event_id AND handler = :handler"
_DELETE = "DELETE FROM {schema}.inbox WHERE event_id = :event_id AND handler = :handler"


class Arrival(Enum):
    """What a delivery is to its handler."""

    FIRST = auto()
    """Never committed before. The key is now held by this transaction."""
    DUPLICATE = auto()
    """Committed before, from the same bytes."""
    CONFLICT = auto()
    """Committed before under the same id, but from other bytes: one of the two is not genuine."""


def first_delivery(
    session: Session, event_id: UUID, handler: str, digest: bytes, *, schema: str = DEFAULT_SCHEMA
) -> Arrival:
    """Enter the delivery; waits (up to `lock_timeout`) while another transaction is entering it."""
    key = {"event_id": event_id, "handler": handler}
    while not fetch(session, _INSERT, {**key, "digest": digest}, schema):
        # None only if the row was forgotten between the two statements: then enter it after all.
        earlier = _compare(session, key, digest, schema)
        if earlier is not None:
            return earlier
    return Arrival.FIRST


def earlier_delivery(
    session: Session, event_id: UUID, handler: str, digest: bytes, *, schema: str = DEFAULT_SCHEMA
) -> Arrival | None:
    """DUPLICATE or CONFLICT where the delivery was committed before, else None. Enters nothing."""
    return _compare(session, {"event_id": event_id, "handler": handler}, digest, schema)


def take_back(
    session: Session, event_id: UUID, handler: str, *, schema: str = DEFAULT_SCHEMA
) -> None:
    """Remove what `first_delivery` entered in this transaction; the key is held until its end."""
    fetch(session, _DELETE, {"event_id": event_id, "handler": handler}, schema)


def _compare(
    session: Session, key: dict[str, object], digest: bytes, schema: str
) -> Arrival | None:
    for row in fetch(session, _DIGEST, key, schema):
        return Arrival.DUPLICATE if bytes(row.digest) == digest else Arrival.CONFLICT
    return None
