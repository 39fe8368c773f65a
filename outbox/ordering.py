"""Ordered keys: a handler gets the events of one key in the order of their commits.

Events of an `ordered=True` type carry a sequence without gaps per key, given in the publishing
transaction. A row (`outbox.places`) says which number a handler takes next of a key. A delivery that comes
before its turn is put by as owed (reason *early*), with no attempt used up; the one whose turn it is
moves the row on and makes the next one due.

Why the order holds at any concurrency: the row is locked from the look at it until the handler's
commit, so the deliveries of one key are handled one after the other, each only at its turn. Why
nothing waits for ever: putting by and moving on take the same lock. Either the early one was put by
before, and moving on finds it and makes it due; or it looks after, and finds its turn come. One that
failed, is tried again later, or is a dead letter keeps its number, so it holds up its own key and no
other, until it is redriven or discarded (`pass_over`).

A handler may see a key first somewhere in the middle: it is new, or an event has overtaken the
first. What comes so is put by (`SETTLE`) until a roll would have named what it has overtaken, and
for as long as anything of its type is missed (`outbox.roll_call`), up to `GIVE_UP`. Then the lowest
number begins that is known of here, be it only as failed, parked or quarantined. A lower one that
comes later still is handled when it comes: late, but never lost.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import timedelta
from enum import Enum, auto
from json.encoder import encode_basestring as quoted
from typing import Any, Final

from sqlalchemy.orm import Session

from outbox import places
from outbox.envelope import decode
from outbox.errors import MalformedMessage
from outbox.places import Place, Standing
from outbox.roll_call import IS_HERE
from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import fetch

log = logging.getLogger(__name__)

SETTLE: Final = timedelta(seconds=10)
"""How long the first event seen of a key that is not its first one waits for those before it: twice
as long as the relay takes to name them."""
GIVE_UP: Final = timedelta(minutes=10)
"""After this it begins although something of its type is still missed, which may be of other keys."""
PUT_BY: Final = timedelta(minutes=10)
"""After this an early delivery looks again by itself, whatever became of the one before it."""

_IS_ANYTHING_MISSED: Final = f"""
SELECT EXISTS (
    SELECT 1 FROM {{schema}}.awaited AS a WHERE a.handler = :handler AND a.type = :type AND a.gone_at IS NULL
        AND NOT ({IS_HERE.format(event="a.event_id", handler="a.handler")})
) OR EXISTS (
    SELECT 1 FROM {{schema}}.missed_roll WHERE service = :service AND type = :type
) AS is_missed
"""  # noqa: S608 - constants
_KNOWN_BEFORE: Final = """
SELECT key_seq, body FROM {schema}.pending_delivery
WHERE handler = :handler AND type = :type AND key = :key AND key_seq < :seq
UNION ALL
SELECT key_seq, body FROM {schema}.dead_letter
WHERE handler = :handler AND type = :type AND key = :key AND key_seq < :seq
UNION ALL
SELECT key_seq, body FROM {schema}.quarantine
WHERE service = :service AND key_seq < :seq AND position(:as_written IN body) > 0
"""
_WAITING_LONG: Final = """
SELECT service, handler, type, key, key_seq, body FROM (
    SELECT *, row_number() OVER (PARTITION BY handler, type, key ORDER BY key_seq) AS place
    FROM {schema}.pending_delivery
    WHERE reason = 'early' AND created_at < clock_timestamp() - :age
        AND (CAST(:service AS text) IS NULL OR service = :service)
) AS early WHERE place = 1
ORDER BY handler, type, key
"""


class Turn(Enum):
    """Whether it is a delivery's turn."""

    NOW = auto()
    EARLY = auto()
    """Others of its key come first."""
    LATE = auto()
    """Its number was passed over: the handler began later, or it was skipped."""


def turn(session: Session, place: Place, *, schema: str = DEFAULT_SCHEMA) -> tuple[Turn, timedelta]:
    """Whether it is its turn, and else how long to wait. Holds the key until the transaction ends."""
    found = places.lock(session, place, schema)
    following = found.next_seq
    if following is None:
        if place.seq != 1 and not _has_settled(session, place, found.age, schema):
            return Turn.EARLY, SETTLE
        first = _lowest_known(session, place, schema)
        following = _set(session, place, found, first, found.passed, schema)
        assert following is not None
    if place.seq == following:
        return Turn.NOW, timedelta(0)
    return (Turn.EARLY, PUT_BY) if place.seq > following else (Turn.LATE, timedelta(0))


def move_on(session: Session, place: Place, *, schema: str = DEFAULT_SCHEMA) -> None:
    """It is handled: the next one's turn has come."""
    # Nobody has changed the row since `turn` locked it.
    if not places.step(session, place, schema):
        found = places.lock(session, place, schema)
        _set(session, place, found, place.seq + 1, found.passed, schema)


def pass_over(
    session: Session,
    body: bytes,
    seq: int | None,
    handler: str | None = None,
    *,
    schema: str = DEFAULT_SCHEMA,
) -> None:
    """The event in *body* will never be handled, so those after it need not wait: by *handler*, or
    by all. Where its turn has not come it is remembered. Nothing, for one that has no order."""
    if seq is None:
        return
    of = _attributes(body)
    if of is None:
        log.error(
            "what has number %d in the order of its key was given up, and cannot be read so far as "
            "to say which key that is: those after it wait until they are discarded or redriven", seq,
        )  # fmt: skip
        return
    key = of["source"], of["type"], of["key"]
    for one in places.handlers_of(session, *key, handler, schema):
        place = Place("", one, *key, seq)
        found = places.lock(session, place, schema)
        if found.next_seq is None or found.next_seq <= seq:
            _set(session, place, found, found.next_seq, [*found.passed, seq], schema)


def pass_over_lost(
    session: Session, *, service: str | None = None, schema: str = DEFAULT_SCHEMA
) -> int:
    """Let keys go on that wait for numbers of which nothing is known here, and nothing is missed:
    events that were lost for good. Returns how many.

    What is put by for less than `GIVE_UP` may only not be named yet, and waits on.
    """
    released = 0
    for row in fetch(session, _WAITING_LONG, {"service": service, "age": GIVE_UP}, schema):
        source = decode(bytes(row.body)).source
        place = Place(row.service, row.handler, source, row.type, row.key, row.key_seq)
        if fetch(session, _IS_ANYTHING_MISSED, vars(place), schema)[0].is_missed:
            log.warning(
                "a key of %s waits for its number before %d, and other events of %s are still "
                "missed: it may be one of them", place.handler, place.seq, place.type,
            )  # fmt: skip
            continue
        found = places.lock(session, place, schema)
        if found.next_seq is None or found.next_seq >= place.seq:
            continue
        if not any(known >= found.next_seq for known in _known_before(session, place, schema)):
            _set(session, place, found, place.seq, found.passed, schema)
            released += 1
    return released


def _attributes(body: bytes) -> dict[str, Any] | None:
    """Source, type and key of an envelope, even if only that of it can be read."""
    try:
        envelope = decode(body)
        return {"source": envelope.source, "type": envelope.type, "key": envelope.key or ""}
    except MalformedMessage:
        pass
    # `encode` writes the data last; inside a string the quotes of this would be escaped.
    head, _, _ = body.partition(b',"data":')
    try:
        raw = json.loads(head + b"}")
        of = {"source": raw["source"], "type": raw["type"], "key": raw["partitionkey"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return of if all(isinstance(value, str) for value in of.values()) else None


def _has_settled(session: Session, place: Place, age: timedelta, schema: str) -> bool:
    """Whether what comes before *place* would be known by now, the key having been seen for *age*."""
    if age < SETTLE:
        return False
    if not fetch(session, _IS_ANYTHING_MISSED, vars(place), schema)[0].is_missed:
        return True
    if age >= GIVE_UP:
        log.warning(
            "%s begins with number %d of a key though events of %s are missed: one of its own that "
            "comes after all comes late", place.handler, place.seq, place.type,
        )  # fmt: skip
    return age >= GIVE_UP


def _lowest_known(session: Session, place: Place, schema: str) -> int:
    """The number at which a handler that has never had this key begins."""
    return min([place.seq, *_known_before(session, place, schema)])


def _known_before(session: Session, place: Place, schema: str) -> list[int]:
    """Lower numbers of its key that are put by, owed, parked or quarantined."""
    values = {**vars(place), "as_written": f'"partitionkey":{quoted(place.key)}'.encode()}
    of = {"source": place.source, "type": place.type, "key": place.key}
    rows = fetch(session, _KNOWN_BEFORE, values, schema)
    return [row.key_seq for row in rows if _attributes(bytes(row.body)) == of]


def _set(
    session: Session,
    place: Place,
    found: Standing,
    following: int | None,
    passed: Sequence[int],
    schema: str,
) -> int | None:
    """Write which number comes next, none of those that were passed over, and make it due."""
    while following is not None and following in passed:
        following += 1
    left = [seq for seq in passed if following is None or seq > following]
    places.write(session, place, found, following, left, schema)
    return following
