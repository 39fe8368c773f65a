"""The relay's answers to subscribers that miss something: events sent again, rolls made again.

A request is a row of `replay_request`, written by the worker that took it or by `outbox audit --repair`. Any relay of
the log answers it, one at a time, and the row goes in the transaction that awaits the broker's confirmation. What is
lost after that is asked for again.

What the broker does not take must not keep the relay from its events, and it may never take it: a queue that is gone.
So the requests of that queue are put off, ever longer, and dropped after a day.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import psycopg
from pydantic import ValidationError

from outbox.buses.base import Bus, OutgoingMessage
from outbox.errors import BusError
from outbox.ids import new_id
from outbox.reader import MESSAGE
from outbox.roll_caller import difference
from outbox.rolls import (
    MOST,
    Gone,
    Named,
    Page,
    Roll,
    Wanted,
    WantedEvent,
    WantedRoll,
    encode,
    records,
)
from outbox.snapshot import NOTHING_SEEN, Snapshot
from outbox.sql import DEFAULT_SCHEMA, in_schema

log = logging.getLogger(__name__)

GONE: Final = "outbox.gone"
"""Stands for the type of the answer that an event is not in the log any more."""

_TAKE: Final = """
DELETE FROM {schema}.replay_request WHERE id = (
    SELECT id FROM {schema}.replay_request WHERE queue <> ALL (%(put_off)s::text[])
    ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED
) RETURNING queue, wanted
"""
_DROP: Final = """
DELETE FROM {schema}.replay_request WHERE queue = %(queue)s AND asked_at < clock_timestamp() - interval '1 day'
RETURNING id
"""
_FIRST_WAIT: Final = 10.0
_LONGEST_WAIT: Final = 600.0
_WHO: Final = """
SELECT l.id, (SELECT queue FROM {schema}.outbox_worker ORDER BY noted_at DESC LIMIT 1) FROM {schema}.outbox_log AS l
"""
_EVENTS: Final = f"""
SELECT {MESSAGE} FROM {{schema}}.outbox_event AS e
JOIN unnest(%(lanes)s::smallint[], %(positions)s::bigint[]) AS w (lane, position) USING (lane, position)
ORDER BY e.position
"""  # noqa: S608 - constants
# The later bound may have been made one with rolls after it: then more is named than was asked for.
_BOUNDS: Final = """
SELECT earlier.hi, earlier.snapshot::text, later.hi, later.snapshot::text
FROM (
    SELECT hi, snapshot FROM {schema}.outbox_roll
    WHERE lane = %(lane)s AND seq >= %(to_seq)s ORDER BY seq LIMIT 1
) AS later
LEFT JOIN LATERAL (
    SELECT hi, snapshot FROM {schema}.outbox_roll
    WHERE lane = %(lane)s AND seq < %(to_seq)s
        AND (seq <= %(from_seq)s OR called_at < %(since)s::timestamptz - interval '1 minute')
    ORDER BY seq DESC LIMIT 1
) AS earlier ON true
"""
_PAGE: Final = """
(SELECT e.event_id, e.position FROM {schema}.outbox_event AS e
 WHERE e.lane = %(lane)s AND e.position > greatest(%(from_hi)s, %(after)s) AND e.position <= %(hi)s
    AND e.type = %(type)s AND pg_visible_in_snapshot(e.xid, %(until)s::pg_snapshot)
 ORDER BY e.position LIMIT %(most)s)
UNION ALL
(SELECT e.event_id, e.position FROM {schema}.outbox_event AS e
 WHERE (e.xid = ANY(%(running)s::text[]::xid8[])
        OR (e.xid >= %(next)s::text::xid8 AND e.xid < %(until_next)s::text::xid8))
    AND e.position <= least(%(from_hi)s, %(hi)s) AND e.position > %(after)s
    AND e.lane = %(lane)s AND e.type = %(type)s AND pg_visible_in_snapshot(e.xid, %(until)s::pg_snapshot)
 ORDER BY e.position LIMIT %(most)s)
ORDER BY 2 LIMIT %(most)s
"""


@dataclass(frozen=True, slots=True)
class _PutOff:
    """A queue for which the broker took nothing."""

    until: float
    wait: float


class Replies:
    """Answers the requests of one log, through a connection in autocommit."""

    def __init__(
        self, connection: psycopg.Connection[Any], bus: Bus, schema: str = DEFAULT_SCHEMA
    ) -> None:
        self._connection = connection
        self._bus = bus
        self._schema = schema
        self._put_off: dict[str, _PutOff] = {}

    def answer_one(self) -> bool:
        """Answer the oldest request that no other relay is at; False where there is none. Raises `BusError`."""
        now = time.monotonic()
        put_off = [queue for queue, one in self._put_off.items() if one.until > now]
        queue = ""
        try:
            with self._connection.transaction():
                taken = self._execute(_TAKE, put_off=put_off)
                if not taken:
                    return False
                queue, wanted = taken[0]
                self._answer(queue, wanted)
        except BusError as error:
            self._put_off_requests_of(queue, error)
            raise
        self._put_off.pop(queue, None)
        return True

    def _put_off_requests_of(self, queue: str, error: BusError) -> None:
        before = self._put_off.get(queue)
        wait = _FIRST_WAIT if before is None else min(before.wait * 2, _LONGEST_WAIT)
        self._put_off[queue] = _PutOff(time.monotonic() + wait, wait)
        log.warning("what %s misses is not sent again for %.0f s: %s", queue, wait, error)
        dropped = self._execute(_DROP, queue=queue)
        if dropped:
            log.error("%d requests of %s could not be answered for a day", len(dropped), queue)

    def _answer(self, queue: str, text: str) -> None:
        try:
            wanted = Wanted.model_validate_json(text)
        except ValidationError:
            log.exception("a replay request that cannot be read was dropped: %.200s", text)
            return
        ((log_id, ask),) = self._execute(_WHO)
        messages = self._copies(queue, wanted.events, log_id)
        messages += [self._page(queue, roll, log_id, ask) for roll in wanted.rolls]
        if messages:
            self._bus.send(messages).wait()
        log.info(
            "sent again to %s: %d events and %d rolls", queue, len(wanted.events), len(wanted.rolls)
        )

    def _copies(
        self, queue: str, wanted: Sequence[WantedEvent], log_id: UUID
    ) -> list[OutgoingMessage]:
        if not wanted:
            return []
        rows = self._execute(
            _EVENTS,
            lanes=[one.lane for one in wanted],
            positions=[one.position for one in wanted],
        )
        # Addressed to one queue: the inbox there decides whether they are new.
        found = {UUID(row[0]): OutgoingMessage._make((*row, queue, None)) for row in rows}
        ids = {one.id for one in wanted}
        copies = [message for id, message in found.items() if id in ids]
        gone = ids - found.keys()
        if gone:
            log.warning("%s asks for %d events that are no longer in the log", queue, len(gone))
            body = encode(Gone(log=log_id, events=tuple(gone)))
            copies.append(OutgoingMessage(str(new_id()), GONE, None, body, 0, 0, queue=queue))
        return copies

    def _page(
        self, queue: str, wanted: WantedRoll, log_id: UUID, ask: str | None
    ) -> OutgoingMessage:
        found: list[Named] = []
        bounds = self._execute(
            _BOUNDS,
            lane=wanted.lane,
            from_seq=wanted.from_seq,
            to_seq=wanted.to_seq,
            since=wanted.since,
        )
        if bounds:
            ((from_hi, from_snapshot, hi, snapshot),) = bounds
            earlier = NOTHING_SEEN if from_snapshot is None else Snapshot(from_snapshot)
            params = difference([(wanted.lane, from_hi or 0, hi)], earlier, Snapshot(snapshot))
            rows = self._execute(
                _PAGE,
                **params,
                lane=wanted.lane,
                from_hi=from_hi or 0,
                hi=hi,
                type=wanted.type,
                after=wanted.position,
                most=MOST + 1,
            )
            found = [Named(id, wanted.lane, position) for id, position in rows]
        more = len(found) > MOST
        found = found[:MOST]
        page = Page(
            lane=wanted.lane, to_seq=wanted.to_seq, next=found[-1].position if more else None
        )
        roll = Roll(log=log_id, type=wanted.type, ask=ask, page=page, records=records(found))
        return OutgoingMessage(
            str(new_id()), wanted.type, None, encode(roll), wanted.lane, 0, queue=queue
        )

    def _execute(self, template: str, **params: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(
            in_schema(template, self._schema).encode(), params or None
        ).fetchall()
