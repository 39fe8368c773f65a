"""The audit: what each source published against what each subscriber has, from the databases alone.

No broker and no running worker is asked. An event counts as published once a relay has handed it over, which the log's
rolls and cursors say (`outbox.rolls`), and for longer than a settle time, so that what is on its way is not called
lost. It is there if the subscriber's inbox has it, or if it is owed, parked or quarantined; and it is due only to
handlers whose subscription is as old as the event (`outbox.subscriptions`).

Read in windows of positions, each window set against each subscriber by one statement: memory does not grow with the
log, but for the missing ids that are kept: ten of each line, or as many as are asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, text

from outbox.roll_call import IS_HERE, IS_NEWS
from outbox.rolls import MOST, Wanted, WantedEvent
from outbox.sql import DEFAULT_SCHEMA, in_schema
from outbox.subscriptions import FIRST_ID_OF

SETTLE: Final = timedelta(minutes=1)
WINDOW: Final = timedelta(days=30)
KEPT: Final = 10
_ROWS: Final = 2_000

_LOG: Final = "SELECT id, current_database() AS name FROM {schema}.outbox_log"
_SUBSCRIBED: Final = """
SELECT DISTINCT service, queue, handler, type FROM {schema}.subscription WHERE ended_at IS NULL
ORDER BY service, handler, type
"""
# Of each lane the newest reading that is older than the settle time.
_SETTLED: Final = """
SELECT DISTINCT ON (lane) lane, hi, snapshot::text AS snapshot FROM (
    SELECT lane, hi, snapshot, called_at AS at FROM {schema}.outbox_roll
    UNION ALL
    SELECT lane, hi, snapshot, stored_at FROM {schema}.outbox_cursor
) AS reading WHERE at < clock_timestamp() - CAST(:settle AS interval) ORDER BY lane, at DESC
"""
_PAGE: Final = """
SELECT e.event_id, e.type, e.lane, e.position FROM {schema}.outbox_event AS e
JOIN unnest(CAST(:lanes AS smallint[]), CAST(:his AS bigint[]), CAST(:snapshots AS text[])) AS l (lane, hi, snapshot)
    ON l.lane = e.lane AND e.position <= l.hi
WHERE e.position > :after AND e.position <= :until AND e.type = ANY(CAST(:types AS text[]))
    AND pg_visible_in_snapshot(e.xid, l.snapshot::pg_snapshot)
ORDER BY e.position
"""
_COMPARE: Final = f"""
SELECT s.handler, s.type, s.service, s.queue, count(*) AS due,
    array_agg(n.number ORDER BY n.number) FILTER (
        WHERE NOT ({IS_HERE.format(event="n.event_id", handler="s.handler")})
    ) AS missing
FROM unnest(
    CAST(:ids AS uuid[]), CAST(:types AS text[]), CAST(:lanes AS smallint[]), CAST(:positions AS bigint[])
) WITH ORDINALITY AS n (event_id, type, lane, position, number)
JOIN {{schema}}.subscription AS s ON s.type = n.type AND s.ended_at IS NULL
    AND n.event_id >= s.first_id
    AND n.event_id >= {FIRST_ID_OF.format(at="clock_timestamp() - CAST(:window AS interval)")}
    AND ({IS_NEWS})
GROUP BY s.handler, s.type, s.service, s.queue
"""  # noqa: S608 - constants
_REQUEST: Final = "INSERT INTO {schema}.replay_request (queue, wanted) VALUES (:queue, :wanted)"


@dataclass
class Line:
    """One type of one source, for one handler."""

    source: str
    """The name of its database."""
    log: UUID
    service: str
    handler: str
    type: str
    due: int = 0
    """Events that the handler should have."""
    missing: int = 0
    first: list[UUID] = field(default_factory=list)
    """The first ones that are missing, as many as were to be kept."""


@dataclass(frozen=True)
class Database:
    """One database with the tables of `outbox`."""

    connection: Connection
    schema: str = DEFAULT_SCHEMA

    def rows(self, sql: str, **values: Any) -> list[Any]:
        return list(self.connection.execute(text(in_schema(sql, self.schema)), values))

    def run(self, sql: str, **values: Any) -> None:
        self.connection.execute(text(in_schema(sql, self.schema)), values)


def audit(
    sources: Sequence[Database],
    subscribers: Sequence[Database],
    *,
    settle: timedelta = SETTLE,
    window: timedelta = WINDOW,
    repair: bool = False,
    keep: int | None = KEPT,
) -> list[Line]:
    """Compare; a line for each source, handler and type that the handler takes.

    *settle*: how long an event may be on its way. *window*: the subscribers' dedupe window; what is older than that
    their inboxes need not have. *repair*: leave requests in the sources' databases, for their relays to send what is
    missing; the caller commits. *keep*: how many missing ids to name in each line, None for all.
    """
    lines: list[Line] = []
    for source in sources:
        (log,) = source.rows(_LOG)
        for subscriber in subscribers:
            lines += _compare(source, log, subscriber, settle, window, repair, keep)
    return lines


def _compare(
    source: Database,
    log: Any,
    subscriber: Database,
    settle: timedelta,
    window: timedelta,
    repair: bool,
    keep: int | None,
) -> Iterable[Line]:
    subscribed = subscriber.rows(_SUBSCRIBED)
    lines = {
        (row.handler, row.type): Line(log.name, log.id, row.service, row.handler, row.type)
        for row in subscribed
    }
    for page in _pages(source, sorted({row.type for row in subscribed}), settle):
        wanted: dict[str, set[int]] = defaultdict(set)
        compared = subscriber.rows(
            _COMPARE,
            ids=[row.event_id for row in page],
            types=[row.type for row in page],
            lanes=[row.lane for row in page],
            positions=[row.position for row in page],
            log=log.id,
            window=window,
        )
        for row in compared:
            missing = [number - 1 for number in row.missing or ()]
            line = lines[row.handler, row.type]
            line.due += row.due
            line.missing += len(missing)
            room = None if keep is None else max(keep - len(line.first), 0)
            line.first += [page[at].event_id for at in missing[:room]]
            wanted[row.queue].update(missing)
        if repair:
            for queue, places in wanted.items():
                _request(source, queue, [page[at] for at in sorted(places)])
    return [line for line in lines.values() if line.due]


def _pages(source: Database, types: Sequence[str], settle: timedelta) -> Iterator[list[Any]]:
    settled = source.rows(_SETTLED, settle=settle)
    last = max((row.hi for row in settled), default=0)
    position, width = _first_position(source) - 1, _ROWS
    while position < last:
        end = min(position + width, last)
        page = source.rows(
            _PAGE,
            after=position,
            until=end,
            types=list(types),
            lanes=[row.lane for row in settled],
            his=[row.hi for row in settled],
            snapshots=[row.snapshot for row in settled],
        )
        position = end
        width = _ROWS if len(page) > _ROWS // 2 else min(width * 2, 100 * _ROWS)
        for start in range(0, len(page), _ROWS):
            yield page[start : start + _ROWS]


def _first_position(source: Database) -> int:
    found = source.rows(
        "SELECT min(first) AS first FROM generate_series(0, 15) AS l (lane) CROSS JOIN LATERAL ("
        " SELECT min(position) AS first FROM {schema}.outbox_event AS e WHERE e.lane = l.lane) AS f"
    )
    return int(found[0].first or 1)


def _request(source: Database, queue: str, rows: Sequence[Any]) -> None:
    for start in range(0, len(rows), MOST):
        events = tuple(
            WantedEvent(id=row.event_id, lane=row.lane, position=row.position)
            for row in rows[start : start + MOST]
        )
        source.run(_REQUEST, queue=queue, wanted=Wanted(events=events).model_dump_json())
