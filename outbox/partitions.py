"""Partitions of the log: made ahead of the writers, dropped once every cursor has passed them and their time is up.

Run by the relay that holds lane 0, and harmless when two do it: each step is a transaction under one lock, for which
whoever comes second does not wait. Nobody else waits either: a lock that cannot be had within 50 ms is tried for again
next time, and meanwhile the log just grows; one that was had is lost, and with it the connection, where the relay is
paused for a second. Should it fall so far behind that the default partition takes rows, those
rows stay there until all of them may go, and the next partition begins behind them.

A partition is dropped by the transaction that has locked it against writers first, and has looked then: whoever wrote
into it has ended by that time, so an event that commits late is seen, or keeps the lock from being had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import psycopg
from psycopg import errors

from outbox.sql import DEFAULT_SCHEMA, briefly, in_schema

log = logging.getLogger(__name__)

SIZE: Final = 1_000_000
"""Positions in one partition."""
AHEAD: Final = 2
"""Whole partitions that lie ready for writers."""
RETENTION: Final = timedelta(days=7)
"""How long delivered events are kept, for replay."""

_DEFAULT: Final = "outbox_event_default"
_PARTITIONS = """
SELECT c.relname,
    regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \\(''?(-?\\d+)''?\\) TO \\(''?(-?\\d+)''?\\)')
FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE i.inhparent = '{schema}.outbox_event'::regclass
"""
_ALONE = "SELECT pg_try_advisory_xact_lock(hashtextextended('outbox partitions {schema}', 0))"
_LAST_POSITION = "SELECT last_value FROM {schema}.outbox_event_position"
_CURSORS = """
WITH newest AS (
    SELECT DISTINCT ON (lane) lane, hi, snapshot FROM {schema}.outbox_cursor ORDER BY lane, epoch DESC, seq DESC
)
"""
_UNREAD = f"""{_CURSORS}
SELECT EXISTS (
    SELECT FROM generate_series(0, 15) AS lanes (lane) LEFT JOIN newest USING (lane)
    JOIN {{schema}}.{{name}} AS e ON e.lane = lanes.lane AND e.position > COALESCE(newest.hi, 0)
) OR EXISTS (
    SELECT FROM newest JOIN {{schema}}.{{name}} AS e USING (lane)
    WHERE e.xid >= pg_snapshot_xmin(newest.snapshot) AND NOT pg_visible_in_snapshot(e.xid, newest.snapshot)
)
"""  # noqa: S608 - a constant
_NEWEST_IS_OLD = """
SELECT max(newest.occurred_at) < clock_timestamp() - %s FROM generate_series(0, 15) AS lanes (lane)
CROSS JOIN LATERAL (
    SELECT occurred_at FROM {schema}.{name} AS e WHERE e.lane = lanes.lane ORDER BY e.position DESC LIMIT 1
) AS newest
"""


class Partitions:
    """The partitions of one log, through a connection in autocommit."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        schema: str = DEFAULT_SCHEMA,
        *,
        size: int = SIZE,
        retention: timedelta = RETENTION,
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._size = size
        self._retention = retention

    def maintain(self) -> None:
        """Make what will be needed, drop what is no longer needed."""
        while self._attempt(self._make_next):
            pass
        while self._attempt(self._drop_first):
            pass
        self._attempt(self._empty_default)

    def _bounds(self) -> dict[str, tuple[int, int]]:
        rows = self._execute(_PARTITIONS)
        return {name: (int(found[0]), int(found[1])) for name, found in rows if found is not None}

    def _make_next(self) -> bool:
        position = self._last_position()
        end = max((upper for _, upper in self._bounds().values()), default=0)
        if end <= position:
            # Rows are in the default partition; a partition that overlaps them could not be attached.
            end = position + self._size
        if end >= position + AHEAD * self._size:
            return False
        name = f"outbox_event_p{end:012d}"
        self._run(f"CREATE TABLE {{schema}}.{name} (LIKE {{schema}}.outbox_event INCLUDING ALL)")
        self._run(
            f"ALTER TABLE {{schema}}.outbox_event ATTACH PARTITION {{schema}}.{name} "
            f"FOR VALUES FROM ({end}) TO ({end + self._size})"
        )
        log.info("made partition %s of the log", name)
        return True

    def _drop_first(self) -> bool:
        name, (_, upper) = min(self._bounds().items(), default=("", (0, 0)))
        if not name or upper > self._last_position():
            return False
        if not self._may_go(name, if_empty=True):
            return False
        self._run(f"DROP TABLE {{schema}}.{name}")
        log.info(
            "dropped partition %s of the log: delivered and older than %s", name, self._retention
        )
        return True

    def _empty_default(self) -> bool:
        if not self._may_go(_DEFAULT, if_empty=False):
            return False
        self._run(f"TRUNCATE {{schema}}.{_DEFAULT}")
        log.info("emptied the default partition: delivered and older than %s", self._retention)
        return True

    def _may_go(self, name: str, *, if_empty: bool) -> bool:
        """Whether all in the partition is old and has been delivered, or *if_empty*; locked against writers if so."""
        (old,) = self._execute(_NEWEST_IS_OLD.replace("{name}", name), self._retention)[0]
        if not (if_empty if old is None else old):
            return False
        self._run(f"LOCK TABLE {{schema}}.{name} IN SHARE MODE")
        return not self._execute(_UNREAD.replace("{name}", name))[0][0]

    def _attempt(self, step: Callable[[], bool]) -> bool:
        """Whether *step* was done; not where it says so, or has to wait for anybody."""
        try:
            with self._connection.transaction():
                self._run(briefly("50ms"))
                return self._execute(_ALONE)[0][0] and step()
        except (errors.LockNotAvailable, errors.DeadlockDetected, errors.CheckViolation) as error:
            # The last: meanwhile a row of what would be the new partition has come into the default one.
            log.debug("left for next time: %s", error)
            return False

    def _last_position(self) -> int:
        return int(self._execute(_LAST_POSITION)[0][0])

    def _run(self, statement: str) -> None:
        self._connection.execute(in_schema(statement, self._schema).encode())

    def _execute(self, template: str, *params: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(
            in_schema(template, self._schema).encode(), params or None
        ).fetchall()
