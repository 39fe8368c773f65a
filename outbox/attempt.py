"""One delivery to one handler: the transactions that it is made of.

Each function here is one stage, runs in the caller's open transaction and neither commits nor
retries: `receive.py` does that. What ends a delivery is always the same commit that holds its
effect: the inbox row with the handler's writes, or the row that says what is still owed.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import dead_letters, inbox, ordering, pending, quarantine
from outbox.context import handling
from outbox.crash_points import crash_point
from outbox.inbox import Arrival
from outbox.ordering import Turn
from outbox.pending import Noted
from outbox.service import Delivery
from outbox.statements import begin_with, fetch
from outbox.transactions import NotBegun
from outbox.transient import is_lock_timeout, is_transient
from outbox.work import LIMIT, Busy, Outcome, Work

log = logging.getLogger(__name__)

# One round trip, before anything can wait for a lock.
_OPEN = f"""{LIMIT.rstrip()},
    (SELECT attempts FROM {{schema}}.pending_delivery
     WHERE handler = :handler AND event_id = :event_id) AS owed,
    EXISTS (SELECT 1 FROM {{schema}}.dead_letter
     WHERE handler = :handler AND event_id = :event_id) AS parked
"""  # noqa: S608 - only of constants
# What a delivery begins with, after the limits and in one message with them: the row in the inbox, unless its standing
# forbids that. One statement has one snapshot; what changes while it waits for the key, it does not see, as two would
# not, of which the second waits: the inbox row then says what has become of the delivery.
_ENTER = """
WITH standing AS MATERIALIZED (
    SELECT (SELECT attempts FROM {schema}.pending_delivery
            WHERE handler = :handler AND event_id = :event_id) AS owed,
        EXISTS (SELECT 1 FROM {schema}.dead_letter
            WHERE handler = :handler AND event_id = :event_id) AS parked
), entered AS (
    INSERT INTO {schema}.inbox (event_id, handler, digest)
    SELECT CAST(:event_id AS uuid), CAST(:handler AS text), CAST(:digest AS bytea) FROM standing
    WHERE CASE WHEN CAST(:noted AS boolean) THEN CAST(:acted AS boolean) OR owed IS NOT NULL
        ELSE owed IS NULL AND NOT parked END
    ON CONFLICT DO NOTHING RETURNING event_id
)
SELECT owed, parked, EXISTS (SELECT 1 FROM entered) AS entered FROM standing
"""


def note(session: Session, work: Work) -> Noted | Outcome:
    """Note, before the handler runs, that an attempt begins.

    For what may have killed a worker before (a redelivery), and for what is run from a note anyway.
    Without it, an event that kills its worker would do so for ever, uncounted.
    """
    standing = _open(session, work)
    if standing.parked and not work.addressed:
        return Outcome.PARKED
    earlier = inbox.earlier_delivery(
        session, work.envelope.id, work.handler.name, work.envelope.digest, schema=work.schema
    )
    if earlier is not None:
        return _settle_repeated(session, work, earlier)
    if not work.addressed:
        lease = work.limits.lease
        if pending.owe_first_attempt(session, work.owed, lease, schema=work.schema):
            return Noted(1)
        return Outcome.OWED
    noted = pending.begin_attempt(
        session, work.handler.name, work.envelope.id, work.limits.lease, schema=work.schema
    )
    return Outcome.STALE if noted is None else noted


def prepare(
    session: Session, work: Work, event: object, attempt: int
) -> Callable[[], Any] | Outcome | None:
    """What a handler commits before it acts outside: the call to make then, or None for no call.

    The attempt was noted, so whatever becomes of the call, the delivery comes back.
    """
    if _open(session, work).owed is None:
        return Outcome.STALE
    assert work.handler.prepare is not None
    when, wait = _turn(session, work)
    if when is Turn.EARLY:
        return _put_by(session, work, attempt, wait)
    with handling(work.envelope, work.service.name):
        call = work.handler.prepare(
            Delivery(work.envelope, event, attempt, work.handler.name), session
        )
        session.flush()
    return call


def deliver(
    session: Session,
    work: Work,
    event: object,
    attempt: int,
    *,
    noted: bool,
    result: object = None,
) -> Outcome:
    """The delivery itself: inbox row, handler, and the note of it gone, to be committed together.

    The *result* of a call outside is always given to the handler, also in a delivery that was
    settled meanwhile: it is about something that has happened. Raises what the handler raises, and
    `Busy`.
    """
    try:
        arrival = _begin(session, work, noted=noted, acted=result is not None)
    except DBAPIError as error:
        raise NotBegun(str(error)) from error
    if isinstance(arrival, Outcome):
        return arrival
    if arrival is not Arrival.FIRST and result is None:
        return _settle_repeated(session, work, arrival)
    when, wait = _turn(session, work)
    if when is Turn.EARLY:
        inbox.take_back(session, work.envelope.id, work.handler.name, schema=work.schema)
        return _put_by(session, work, attempt, wait)
    crash_point("receive.begun")
    delivery = Delivery(work.envelope, event, attempt, work.handler.name, result)
    with handling(work.envelope, work.service.name):
        work.handler.run(delivery, session)
        session.flush()
    crash_point("receive.handled")
    if noted:
        pending.withdraw(session, work.handler.name, work.envelope.id, schema=work.schema)
    if when is Turn.NOW and work.place is not None:
        ordering.move_on(session, work.place, schema=work.schema)
    return Outcome.HANDLED


def settle_failure(
    session: Session,
    work: Work,
    event: object,
    attempt: int,
    error: BaseException,
    random: Random,
) -> Outcome:
    """Note the retry of a failed attempt, or park it after the last one with the handler's hook.

    Enters the delivery first, and takes that back: so it waits for a commit that is still under way
    (its error said nothing) and never calls a committed delivery a failure. Raises `Busy`.
    """
    _open(session, work)
    arrival = _enter(session, work)
    if arrival is not Arrival.FIRST:
        return _settle_repeated(session, work, arrival)
    # What was found of its key went with the transaction that failed, and those after it must wait.
    _turn(session, work)
    inbox.take_back(session, work.envelope.id, work.handler.name, schema=work.schema)
    retry = work.handler.retry
    if attempt < retry.attempts:
        _owe_retry(session, work, attempt, error, retry.delay(attempt, random))
        return Outcome.RETRY
    return _park(session, work, event, attempt, error)


def put_off(session: Session, work: Work, attempt: int, delay: timedelta) -> Outcome:
    """Look again after *delay*: another worker is at it. Does not count as an attempt."""
    _open(session, work)
    pending.owe(
        session, work.owed, "retry", delay=delay, attempts=attempt - 1,
        error="another worker was at it", schema=work.schema,
    )  # fmt: skip
    return Outcome.BUSY


def refuse_unreadable(session: Session, work: Work, attempt: int, error: Exception) -> Outcome:
    """Quarantine what no number of attempts can give to this handler, with the handler's hook."""
    _open(session, work)
    try:
        with session.begin_nested():
            _tell_exhausted(session, work, None, attempt, error)
    except Exception as hook_error:
        return _hook_failed(session, work, attempt, hook_error)
    return _quarantine(session, work, str(error))


def _quarantine(session: Session, work: Work, reason: str) -> Outcome:
    log.error("%s quarantined: %s", work, reason)
    quarantine.put(
        session, work.service.name, work.envelope.body, reason,
        headers={"handler": work.handler.name}, key_seq=work.key_seq, event_id=work.envelope.id,
        schema=work.schema,
    )  # fmt: skip
    pending.withdraw(session, work.handler.name, work.envelope.id, schema=work.schema)
    return Outcome.QUARANTINED


@dataclass(frozen=True)
class _Standing:
    owed: int | None
    parked: bool


def _open(session: Session, work: Work) -> _Standing:
    values = {
        **work.limits.parameters,
        "handler": work.handler.name,
        "event_id": work.envelope.id,
    }
    (row,) = fetch(session, _OPEN, values, work.schema)
    return _Standing(owed=row.owed, parked=row.parked)


def _begin(session: Session, work: Work, *, noted: bool, acted: bool) -> Arrival | Outcome:
    """Enter the delivery, unless its standing says how it ends: one round trip, BEGIN and all.

    *noted*: its attempt was, and the note must still be there; unless it has *acted* outside.
    """
    values = {
        "handler": work.handler.name,
        "event_id": work.envelope.id,
        "digest": work.envelope.digest,
        "noted": noted,
        "acted": acted,
    }
    first = [(LIMIT, work.limits.parameters), (_ENTER, values)]
    with _busy_if_locked(f"{work} is being handled by another worker"):
        ((owed, parked, entered),) = begin_with(session, first, work.schema)
    if entered:
        return Arrival.FIRST
    if noted and owed is None and not acted:
        return Outcome.STALE
    if not noted and parked:
        return Outcome.PARKED
    if not noted and owed is not None:
        return Outcome.OWED
    return _enter(session, work)


def _enter(session: Session, work: Work) -> Arrival:
    with _busy_if_locked(f"{work} is being handled by another worker"):
        return inbox.first_delivery(
            session, work.envelope.id, work.handler.name, work.envelope.digest, schema=work.schema
        )


@contextmanager
def _busy_if_locked(told: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if is_lock_timeout(error):
            # Without the cause, which would make it look like something to try again at once.
            raise Busy(told) from None
        raise


def _turn(session: Session, work: Work) -> tuple[Turn, timedelta]:
    if work.place is None:
        return Turn.NOW, timedelta(0)
    with _busy_if_locked(f"another event of the key of {work} is being handled"):
        return ordering.turn(session, work.place, schema=work.schema)


def _put_by(session: Session, work: Work, attempt: int, wait: timedelta) -> Outcome:
    pending.owe(session, work.owed, "early", delay=wait, attempts=attempt - 1, schema=work.schema)
    return Outcome.EARLY


def _settle_repeated(session: Session, work: Work, arrival: Arrival) -> Outcome:
    if arrival is Arrival.CONFLICT:
        reason = "an event with this id and other content was handled before"
        return _quarantine(session, work, reason)
    pending.withdraw(session, work.handler.name, work.envelope.id, schema=work.schema)
    return Outcome.DUPLICATE


def _owe_retry(
    session: Session, work: Work, attempt: int, error: BaseException, delay: timedelta
) -> None:
    log.warning(
        "%s failed in attempt %d of %d, next in %.1f s: %s",
        work, attempt, work.handler.retry.attempts, delay.total_seconds(), _in_short(error),
    )  # fmt: skip
    pending.owe(
        session, work.owed, "retry", delay=delay, attempts=attempt, error=_in_short(error),
        schema=work.schema,
    )  # fmt: skip


def _park(
    session: Session, work: Work, event: object, attempt: int, error: BaseException
) -> Outcome:
    in_full = "".join(traceback.format_exception(error))
    try:
        with session.begin_nested():
            dead_letters.park(
                session, work.owed, attempt, _in_short(error), in_full, schema=work.schema
            )
            _tell_exhausted(session, work, event, attempt, error)
    except Exception as hook_error:
        return _hook_failed(session, work, attempt, hook_error)
    log.error("%s parked after attempt %d: %s", work, attempt, _in_short(error))
    return Outcome.PARKED


def _tell_exhausted(
    session: Session, work: Work, event: object, attempt: int, error: BaseException
) -> None:
    if work.handler.exhausted is not None:
        delivery = Delivery(work.envelope, event, attempt, work.handler.name)
        with handling(work.envelope, work.service.name):
            work.handler.exhausted(delivery, session, error)


def _hook_failed(session: Session, work: Work, attempt: int, error: Exception) -> Outcome:
    if isinstance(error, Busy) or is_transient(error):
        raise error
    # What the hook would have said must be said some time: keep trying, at the slowest pace.
    log.error("%s: its exhausted hook failed, so it is not set aside yet", work, exc_info=error)
    _owe_retry(session, work, attempt, error, work.handler.retry.cap)
    return Outcome.RETRY


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
