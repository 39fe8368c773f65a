"""Where a handler stands in an ordered key: the one row that says so, read, locked and moved on.

It lies in `inbox_order`, and once the key is busy in `inbox_busy_order` (`outbox.busy_keys` says why, and
why there is never more than one). What the numbers mean, and who comes next, is the business of
`outbox.ordering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy.orm import Session

from outbox.busy_keys import SPAN, BusyKeys
from outbox.errors import SchemaError
from outbox.pending import DUE_AT_ONCE
from outbox.statements import fetch

_MOVED: Final = 0
"""As the next number in `inbox_order`: the row is in `inbox_busy_order`."""

_OF_KEY: Final = "handler = :handler AND source = :source AND type = :type AND key = :key"
_FIRST_SEEN: Final = """
INSERT INTO {schema}.inbox_order (handler, source, type, key, next_seq)
VALUES (:handler, :source, :type, :key, CASE WHEN :seq = 1 THEN 1 END)
ON CONFLICT DO NOTHING
"""
_LOCK: Final = f"""
SELECT next_seq, passed, clock_timestamp() - seen_at AS age
FROM {{schema}}.inbox_order WHERE {_OF_KEY} FOR UPDATE
"""  # noqa: S608 - a constant, as below
_LOCK_BUSY: Final = f"""
SELECT next_seq, passed, clock_timestamp() - seen_at AS age
FROM {{schema}}.inbox_busy_order WHERE {_OF_KEY} ORDER BY span DESC LIMIT 1 FOR UPDATE
"""  # noqa: S608
# By whichever source: one that is not meant finds that it is not its turn, and is put by again.
_DUE: Final = """
UPDATE {schema}.pending_delivery SET next_attempt_at = clock_timestamp(), sends = 0
WHERE handler = :handler AND type = :type AND key = :key AND reason = 'early' AND key_seq = :next
"""
_RELEASE: Final = f"{_DUE} RETURNING true"


def _step(update: str) -> str:
    return f"""
WITH moved AS (
    {update}
    RETURNING true
), released AS (
    {_DUE} AND EXISTS (SELECT 1 FROM moved) RETURNING true
)
SELECT EXISTS (SELECT 1 FROM released) AS released FROM moved
"""  # noqa: S608


# The usual way on, where nothing was passed over: no row for what has something to look at.
_STEP: Final = _step(f"""
    UPDATE {{schema}}.inbox_order SET next_seq = :next, seen_at = clock_timestamp()
    WHERE {_OF_KEY} AND passed = '{{}}' AND next_seq <> {_MOVED}
""")  # noqa: S608
_STEP_BUSY: Final = _step(f"""
    UPDATE {{schema}}.inbox_busy_order
    SET next_seq = :next, span = :next_span, seen_at = clock_timestamp()
    WHERE {_OF_KEY} AND span = :span AND passed = '{{}}'
""")  # noqa: S608
# What has not begun goes on settling.
_SET: Final = f"""
UPDATE {{schema}}.inbox_order SET next_seq = :next, passed = :passed,
    seen_at = CASE WHEN CAST(:next AS bigint) IS NULL THEN seen_at ELSE clock_timestamp() END
WHERE {_OF_KEY}
"""  # noqa: S608
_SET_BUSY: Final = f"""
UPDATE {{schema}}.inbox_busy_order
SET next_seq = :next, span = :next_span, passed = :passed, seen_at = clock_timestamp()
WHERE {_OF_KEY} AND span = :span
"""  # noqa: S608
_MOVE: Final = f"""
WITH moved AS (
    UPDATE {{schema}}.inbox_order SET next_seq = {_MOVED}, passed = '{{}}' WHERE {_OF_KEY}
)
INSERT INTO {{schema}}.inbox_busy_order (handler, source, type, key, span, next_seq, passed)
VALUES (:handler, :source, :type, :key, :next_span, :next, :passed)
"""  # noqa: S608
_HANDLERS: Final = """
SELECT handler FROM {schema}.inbox_order
WHERE source = :source AND type = :type AND key = :key
    AND (CAST(:handler AS text) IS NULL OR handler = :handler)
ORDER BY handler
"""

BUSY: Final = BusyKeys()


@dataclass(frozen=True)
class Place:
    """A delivery's place in the order of its key."""

    service: str
    handler: str
    source: str
    type: str
    key: str
    seq: int


@dataclass(frozen=True)
class Standing:
    """What the row says; locked until the transaction ends."""

    next_seq: int | None
    """The number that the handler takes next; None until that is known."""
    passed: Sequence[int]
    """Numbers to come that will never be handled."""
    age: timedelta
    """Since it last moved on; before it has begun, since the key was seen first."""
    is_busy: bool


def lock(session: Session, place: Place, schema: str) -> Standing:
    """The row of the key, written where there is none. Raises `SchemaError` where it is not where it is to be."""
    found = _lock_busy(session, place, schema) if _hint(place, schema) in BUSY else None
    found = found or _lock_first(session, place, schema)
    if found is None:
        # It had moved, so that is committed, and the next statement sees it.
        BUSY.add(_hint(place, schema))
        found = _lock_busy(session, place, schema)
    if found is None:
        raise SchemaError(
            f"where {place.handler} stands in key {place.key!r} ({place.type} of {place.source}) is to be in "
            f"{schema}.inbox_busy_order, and is not: put back the row, or delete that of {schema}.inbox_order "
            "to have the handler begin with the next event that comes"
        )
    return found


def step(session: Session, place: Place, schema: str) -> bool:
    """From the number of *place* to the next, making that due; False, with nothing done, where it is not as simple.

    The row must be locked, and say that this number is the next.
    """
    following = place.seq + 1
    values = {**vars(place), "next": following, "span": place.seq // SPAN}
    if _hint(place, schema) in BUSY:
        rows = fetch(session, _STEP_BUSY, {**values, "next_span": following // SPAN}, schema)
    elif following < SPAN:
        rows = fetch(session, _STEP, values, schema)
    else:
        return False
    for row in rows:
        if row.released:
            session.info[DUE_AT_ONCE] = True
        return True
    return False


def write(
    session: Session,
    place: Place,
    found: Standing,
    following: int | None,
    passed: Sequence[int],
    schema: str,
) -> None:
    """Have the row, which was *found* so, say what comes next and what was passed over; makes the next due."""
    values = {**vars(place), "next": following, "passed": list(passed)}
    if found.is_busy:
        assert found.next_seq is not None
        assert following is not None
        spans = {"span": found.next_seq // SPAN, "next_span": following // SPAN}
        fetch(session, _SET_BUSY, {**values, **spans}, schema)
    elif following is not None and following >= SPAN:
        fetch(session, _MOVE, {**values, "next_span": following // SPAN}, schema)
        BUSY.add(_hint(place, schema))
    else:
        fetch(session, _SET, values, schema)
    if fetch(session, _RELEASE, values, schema):
        session.info[DUE_AT_ONCE] = True


def handlers_of(
    session: Session, source: str, event_type: str, key: str, handler: str | None, schema: str
) -> list[str]:
    """The handlers that have a row for the key, or *handler* only, sorted."""
    values = {"source": source, "type": event_type, "key": key, "handler": handler}
    return [row.handler for row in fetch(session, _HANDLERS, values, schema)]


def _lock_first(session: Session, place: Place, schema: str) -> Standing | None:
    """None where the key has moved on from its first row."""
    values = vars(place)
    while not (rows := fetch(session, _LOCK, values, schema)):
        # Waits for whoever is writing the same, and then finds it.
        fetch(session, _FIRST_SEEN, values, schema)
    found = rows[0]
    if found.next_seq == _MOVED:
        return None
    return Standing(found.next_seq, found.passed, found.age, is_busy=False)


def _lock_busy(session: Session, place: Place, schema: str) -> Standing | None:
    for found in fetch(session, _LOCK_BUSY, vars(place), schema):
        return Standing(found.next_seq, found.passed, found.age, is_busy=True)
    return None


def _hint(place: Place, schema: str) -> tuple[str, ...]:
    return schema, place.handler, place.source, place.type, place.key
