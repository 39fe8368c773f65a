"""The subscriber's part in the rolls: what was sent and is not here is awaited, and then asked for.

`take` is what becomes of a roll that a worker was given, in one transaction of its own; the look for what stays away is
`outbox.vigil`. The argument is in `outbox/rolls.py`. Here it rests on three things:

- *Is it here?* An event is here for a handler if the inbox has it, if it is owed, parked or quarantined. All of that is
  committed by whoever settled the delivery, so an event that is not here yet may be on its way or in a worker's hands:
  its row in `awaited` is looked at again before anything is asked for.
- *Was every roll here?* `roll_seen` says up to which one a lane was taken; a roll that names a predecessor beyond it
  leaves a row in `missed_roll`, in the same transaction that moves `roll_seen` on. So a gap is noted before it is
  passed over. The rows are locked in the order of their lanes; workers that take rolls at once wait for each other.
- *Whose is it?* What is older than the subscription (`outbox.subscriptions`) or than the dedupe window is not missed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.rolls import Ask, Control, Gone, Named, Page, Roll
from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement
from outbox.subscriptions import FIRST_ID_OF

log = logging.getLogger(__name__)

IS_HERE: Final = """
(SELECT true FROM {{schema}}.inbox AS i WHERE i.event_id = {event} AND i.handler = {handler}) IS NOT NULL
OR (SELECT true FROM {{schema}}.pending_delivery AS p WHERE p.handler = {handler} AND p.event_id = {event}) IS NOT NULL
OR (SELECT true FROM {{schema}}.dead_letter AS d WHERE d.handler = {handler} AND d.event_id = {event}) IS NOT NULL
OR (SELECT true FROM {{schema}}.quarantine AS q WHERE q.event_id = {event} LIMIT 1) IS NOT NULL
"""
"""SQL: whether anything is known of an event for a handler. Sub-selects, which are looked up one by one whatever the
planner thinks of the sizes."""

IS_NEWS: Final = """
s.hears_itself OR s.service IS DISTINCT FROM (
    SELECT CAST(convert_from(e.body, 'UTF8') AS json) ->> 'source'
    FROM {schema}.outbox_event AS e JOIN {schema}.outbox_log AS l ON l.id = :log
    WHERE e.lane = n.lane AND e.position = n.position)
"""
"""SQL: whether a handler is given the event at all. What a service says itself can only be in its own log."""

_SUBSCRIBED: Final = """
SELECT min(since) FROM {schema}.subscription WHERE service = :service AND type = :type AND ended_at IS NULL
"""
_SEEN: Final = """
SELECT lane, seq FROM {schema}.roll_seen WHERE service = :service AND log = :log AND type = :type
ORDER BY lane FOR UPDATE
"""
_SEE: Final = """
INSERT INTO {schema}.roll_seen AS known (service, log, type, lane, seq, ask)
SELECT :service, :log, :type, l.lane, l.seq, :ask
FROM unnest(CAST(:lanes AS smallint[]), CAST(:seqs AS bigint[])) AS l (lane, seq) ORDER BY l.lane
ON CONFLICT (service, log, type, lane) DO UPDATE
SET seq = greatest(known.seq, EXCLUDED.seq), ask = EXCLUDED.ask, seen_at = clock_timestamp()
"""
_MISS: Final = """
INSERT INTO {schema}.missed_roll (service, log, type, lane, from_seq, to_seq, next_ask_at)
VALUES (:service, :log, :type, :lane, :from_seq, :to_seq, clock_timestamp() + :patience)
ON CONFLICT DO NOTHING
"""
_CAME_AFTER_ALL: Final = """
DELETE FROM {schema}.missed_roll
WHERE service = :service AND log = :log AND type = :type AND lane = :lane AND to_seq = :seq AND from_seq >= :previous
"""
_PAGE_CAME: Final = """
UPDATE {schema}.missed_roll SET position = greatest(position, :next), asks = 0, next_ask_at = clock_timestamp()
WHERE service = :service AND log = :log AND type = :type AND lane = :lane AND to_seq = :to_seq
"""
_ALL_CAME: Final = """
DELETE FROM {schema}.missed_roll
WHERE service = :service AND log = :log AND type = :type AND lane = :lane AND to_seq = :to_seq
"""
_AWAIT: Final = f"""
INSERT INTO {{schema}}.awaited (handler, event_id, service, type, log, lane, position, next_ask_at)
SELECT s.handler, n.event_id, :service, :type, :log, n.lane, n.position, clock_timestamp() + :patience
FROM unnest(CAST(:ids AS uuid[]), CAST(:lanes AS smallint[]), CAST(:positions AS bigint[]))
    AS n (event_id, lane, position)
JOIN {{schema}}.subscription AS s ON s.service = :service AND s.type = :type AND s.ended_at IS NULL
    AND n.event_id >= s.first_id AND n.event_id >= {FIRST_ID_OF.format(at="clock_timestamp() - :window")}
WHERE NOT ({IS_HERE.format(event="n.event_id", handler="s.handler")}) AND ({IS_NEWS})
ORDER BY s.handler, n.event_id
ON CONFLICT DO NOTHING
"""  # noqa: S608 - constants
_REQUEST: Final = """
INSERT INTO {schema}.replay_request (queue, wanted) SELECT :queue, :wanted FROM {schema}.outbox_log WHERE id = :log
RETURNING id
"""
_GONE: Final = """
UPDATE {schema}.awaited SET gone_at = clock_timestamp(), next_ask_at = clock_timestamp() + interval '100 years'
WHERE service = :service AND log = :log AND event_id = ANY(CAST(:events AS uuid[])) AND gone_at IS NULL
RETURNING handler, type, event_id
"""


@dataclass(frozen=True)
class Subscriber:
    """Who takes a roll, and how it waits for what is not here."""

    service: str
    patience: timedelta
    """How long an event may be on its way until it is asked for."""
    window: timedelta
    """The dedupe window."""
    schema: str = DEFAULT_SCHEMA


def take(session: Session, who: Subscriber, message: Control) -> str:
    """Take one message between relays and workers, in the caller's transaction; returns what became of it."""
    match message:
        case Roll():
            return _take_roll(session, who, message)
        case Ask():
            return _take_ask(session, who, message)
        case Gone():
            return _take_gone(session, who, message)


def _take_roll(session: Session, who: Subscriber, roll: Roll) -> str:
    values = {"service": who.service, "log": roll.log, "type": roll.type}
    since = session.execute(statement(_SUBSCRIBED, who.schema), values).scalar()
    if since is None:
        return "a roll of events that nobody here subscribes to"
    if roll.page is not None:
        _take_page(session, who, roll.page, values)
    else:
        _take_entries(session, who, roll, since, values)
    awaited = _await(session, who, list(roll.named()), values)
    return f"a roll; {awaited} awaited"


def _take_entries(
    session: Session, who: Subscriber, roll: Roll, since: Any, values: dict[str, Any]
) -> None:
    seen = {row.lane: row.seq for row in session.execute(statement(_SEEN, who.schema), values)}
    for entry in roll.entries:
        known = seen.get(entry.lane)
        of_lane = {**values, "lane": entry.lane}
        if entry.previous > (known or 0) and (known is not None or entry.previous_at >= since):
            session.execute(
                statement(_MISS, who.schema),
                {
                    **of_lane,
                    "from_seq": known or 0,
                    "to_seq": entry.previous,
                    "patience": who.patience,
                },
            )
        elif entry.previous < entry.seq <= (known or 0):
            session.execute(
                statement(_CAME_AFTER_ALL, who.schema),
                {**of_lane, "seq": entry.seq, "previous": entry.previous},
            )
    session.execute(
        statement(_SEE, who.schema),
        {
            **values,
            "ask": roll.ask,
            "lanes": [entry.lane for entry in roll.entries],
            "seqs": [entry.seq for entry in roll.entries],
        },
    )


def _take_page(session: Session, who: Subscriber, page: Page, values: dict[str, Any]) -> None:
    of_lane = {**values, "lane": page.lane, "to_seq": page.to_seq}
    if page.next is None:
        session.execute(statement(_ALL_CAME, who.schema), of_lane)
    else:
        session.execute(statement(_PAGE_CAME, who.schema), {**of_lane, "next": page.next})


def _await(
    session: Session, who: Subscriber, named: Sequence[Named], values: dict[str, Any]
) -> int:
    if not named:
        return 0
    result: Any = session.execute(
        statement(_AWAIT, who.schema),
        {
            **values,
            "ids": [one.event_id for one in named],
            "lanes": [one.lane for one in named],
            "positions": [one.position for one in named],
            "patience": who.patience,
            "window": who.window,
        },
    )
    return int(result.rowcount)


def _take_ask(session: Session, who: Subscriber, ask: Ask) -> str:
    noted = session.execute(
        statement(_REQUEST, who.schema),
        {"queue": ask.queue, "wanted": ask.wanted.model_dump_json(), "log": ask.log},
    ).scalar()
    if noted is None:
        log.warning("%s asks for events of log %s, which is not the one here", ask.queue, ask.log)
        return "asked for another log's events"
    return f"noted what {ask.queue} misses"


def _take_gone(session: Session, who: Subscriber, gone: Gone) -> str:
    rows = session.execute(
        statement(_GONE, who.schema),
        {"service": who.service, "log": gone.log, "events": list[UUID](gone.events)},
    )
    for row in rows:
        log.error(
            "event %s %s never came to %s, and its source does not have it any more: see `outbox status`",
            row.type, row.event_id, row.handler,
        )  # fmt: skip
    return "events that are gone"
