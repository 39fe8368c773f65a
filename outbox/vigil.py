"""Looks after what a subscriber misses: asks the source for it, again and ever less often, until it is here.

A part of the sweeper's thread; several workers share the rows by skipping each other's. Asking is safe at any time:
what comes twice the inbox drops. A request is no event and goes through no outbox, as it is repeated for as long as
something is missed, and as a service that only listens has no relay.

Of each source no more is asked for at a time than a worker handles within its patience: what was sent again waits in
the queue like any event, and what waits there for longer would be asked for, and sent, again and again. For the same
reason nothing is asked for a second time while what that source sent again is still coming in.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import subscriptions
from outbox.roll_call import IS_HERE
from outbox.rolls import MOST, Ask, Wanted, WantedEvent, WantedRoll, encode
from outbox.service import Service
from outbox.statements import fetch

log = logging.getLogger(__name__)

SendTo = Callable[[str, bytes], None]
"""Sends a body to a queue by its name. Raises if the broker did not take it."""

_LOOK_EVERY: Final = 2.0
_NOTE_EVERY: Final = 600.0
_AT_ONCE: Final = 5_000
_UNDER_WAY: Final = 2_000
"""Events that may be asked for, and not here yet, of one source. One that was asked for three times counts no more."""
_LONGEST_WAIT: Final = timedelta(hours=1)

_FORGET_WHAT_CAME: Final = f"""
WITH overdue AS MATERIALIZED (
    SELECT handler, event_id FROM {{schema}}.awaited
    WHERE service = :service AND next_ask_at <= clock_timestamp()
    ORDER BY next_ask_at LIMIT :limit FOR UPDATE SKIP LOCKED
), under_way AS MATERIALIZED (
    SELECT handler, event_id FROM {{schema}}.awaited
    WHERE service = :service AND next_ask_at > clock_timestamp() AND asks BETWEEN 1 AND 3
    ORDER BY next_ask_at LIMIT :limit FOR UPDATE SKIP LOCKED
), due AS (
    SELECT * FROM overdue UNION ALL SELECT * FROM under_way
)
DELETE FROM {{schema}}.awaited AS a USING due
WHERE a.handler = due.handler AND a.event_id = due.event_id
    AND ({IS_HERE.format(event="due.event_id", handler="due.handler")})
RETURNING a.type, a.asks, a.log
"""  # noqa: S608 - constants
_UNDER_WAY_BY_LOG: Final = """
SELECT log, count(*) FILTER (WHERE asks BETWEEN 1 AND 3) AS under_way
FROM {schema}.awaited WHERE service = :service AND gone_at IS NULL
GROUP BY log HAVING bool_or(next_ask_at <= clock_timestamp())
"""
_ASK_OF: Final = """
(SELECT r.ask FROM {{schema}}.roll_seen AS r
 WHERE r.service = {row}.service AND r.log = {row}.log AND r.ask IS NOT NULL ORDER BY r.seen_at DESC LIMIT 1)
"""
_DUE_EVENTS: Final = f"""
WITH due AS MATERIALIZED (
    SELECT handler, event_id FROM {{schema}}.awaited
    WHERE service = :service AND log = :log AND next_ask_at <= clock_timestamp() AND gone_at IS NULL
        AND (asks = 0) = :for_the_first_time
    ORDER BY next_ask_at LIMIT :limit FOR UPDATE SKIP LOCKED
)
UPDATE {{schema}}.awaited AS a
SET asks = asks + 1, next_ask_at = clock_timestamp() + least(:patience * power(2, least(asks, 20)), :longest)
FROM due WHERE a.handler = due.handler AND a.event_id = due.event_id
RETURNING a.event_id, a.type, a.log, a.lane, a.position, a.asks, {_ASK_OF.format(row="a")} AS ask
"""  # noqa: S608
_DUE_ROLLS: Final = f"""
WITH due AS MATERIALIZED (
    SELECT log, type, lane, to_seq FROM {{schema}}.missed_roll
    WHERE service = :service AND next_ask_at <= clock_timestamp()
    ORDER BY next_ask_at LIMIT :limit FOR UPDATE SKIP LOCKED
)
UPDATE {{schema}}.missed_roll AS m
SET asks = asks + 1, next_ask_at = clock_timestamp() + least(:patience * power(2, least(asks, 20)), :longest)
FROM due WHERE m.service = :service AND m.log = due.log AND m.type = due.type AND m.lane = due.lane
    AND m.to_seq = due.to_seq
RETURNING m.*, {_ASK_OF.format(row="m")} AS ask,
    (SELECT min(since) FROM {{schema}}.subscription AS s WHERE s.service = :service AND s.type = m.type) AS since
"""  # noqa: S608


@dataclass(frozen=True)
class _Asking:
    """What is to be asked of one log, and where."""

    log: UUID
    queue: str | None


class Vigil:
    """Of one service, whose sweeper calls `look` every now and then."""

    def __init__(
        self,
        service: Service,
        engine: Engine | Callable[[], Engine],
        send: SendTo,
        *,
        patience: timedelta,
    ) -> None:
        """*patience*: how long to wait for what was asked for until it is asked for again; it doubles each time."""
        self._service = service
        self._engine = engine
        self._send = send
        self._patience = patience
        self._came_at: dict[UUID, float] = {}
        """By log, when the last event came that it was asked for."""
        self._note_at = 0.0
        self._look_at = 0.0
        self._look_every = min(_LOOK_EVERY, patience.total_seconds())

    def look(self) -> None:
        """Note the subscriptions, forget what came, ask for what did not; seldom enough to be called often."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + self._look_every
        with Session(self._get_engine()) as session, session.begin():
            if now >= self._note_at:
                subscriptions.note(session, self._service)
            asks = self._due(session)
        if now >= self._note_at:
            self._note_at = now + _NOTE_EVERY
        for queue, body in asks:
            self._send(queue, body)

    def _due(self, session: Session) -> list[tuple[str, bytes]]:
        values = {
            "service": self._service.name,
            "limit": _AT_ONCE,
            "patience": self._patience,
            "longest": _LONGEST_WAIT,
        }
        came = self._fetch(session, _FORGET_WHAT_CAME, values)
        _tell("{} of {} came after being asked for", (row.type for row in came if row.asks))
        events: list[Any] = []
        now = time.monotonic()
        self._came_at |= {row.log: now for row in came if row.asks}
        for log_id, under_way in self._fetch(session, _UNDER_WAY_BY_LOG, values):
            of_log = {**values, "log": log_id}
            anew = {"limit": max(0, _UNDER_WAY - under_way), "for_the_first_time": True}
            events += self._fetch(session, _DUE_EVENTS, {**of_log, **anew})
            if now - self._came_at.get(log_id, float("-inf")) > self._patience.total_seconds():
                again = {"limit": _UNDER_WAY, "for_the_first_time": False}
                events += self._fetch(session, _DUE_EVENTS, {**of_log, **again})
        _tell(
            "{} of {} did not come within their time and are asked for",
            (row.type for row in events if row.asks == 1),
            level=logging.WARNING,
        )
        rolls = self._fetch(session, _DUE_ROLLS, values)
        return self._asks(events, rolls)

    def _asks(self, events: Sequence[Any], rolls: Sequence[Any]) -> list[tuple[str, bytes]]:
        wanted_events: dict[_Asking, dict[UUID, WantedEvent]] = defaultdict(dict)
        wanted_rolls: dict[_Asking, list[WantedRoll]] = defaultdict(list)
        for row in events:
            wanted_events[_Asking(row.log, row.ask)][row.event_id] = WantedEvent(
                id=row.event_id, lane=row.lane, position=row.position
            )
        for row in rolls:
            if row.since is not None:
                wanted_rolls[_Asking(row.log, row.ask)].append(
                    WantedRoll(
                        type=row.type, lane=row.lane, from_seq=row.from_seq, to_seq=row.to_seq,
                        since=row.since, position=row.position,
                    )
                )  # fmt: skip
        bodies = []
        for asking in wanted_events.keys() | wanted_rolls.keys():
            if asking.queue is None:
                log.warning(
                    "nobody can be asked for what log %s sent and %s misses, as no worker of its source is known: "
                    "`outbox audit --repair` does it by hand", asking.log, self._service.name,
                )  # fmt: skip
                continue
            one_by_one = sorted(wanted_events[asking].values(), key=lambda one: one.position)
            by_roll = wanted_rolls[asking]
            for start in range(0, max(len(one_by_one), len(by_roll)), MOST):
                wanted = Wanted(
                    events=tuple(one_by_one[start : start + MOST]),
                    rolls=tuple(by_roll[start : start + MOST]),
                )
                ask = Ask(log=asking.log, queue=self._service.queue, wanted=wanted)
                bodies.append((asking.queue, encode(ask)))
        return bodies

    def _fetch(self, session: Session, template: str, values: Mapping[str, Any]) -> Sequence[Any]:
        return fetch(session, template, values, self._service.schema)

    def _get_engine(self) -> Engine:
        return self._engine if isinstance(self._engine, Engine) else self._engine()


def _tell(text: str, types: Iterable[str], *, level: int = logging.INFO) -> None:
    counts: dict[str, int] = defaultdict(int)
    for type in types:
        counts[type] += 1
    for type, count in sorted(counts.items()):
        log.log(level, text.format(count, type))
