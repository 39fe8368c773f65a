"""Partitions of the log: made ahead of the writers, dropped once every cursor has passed them and their time is up.

Run by the relay that holds lane 0, and harmless when two do it: what exists already is left alone. Nobody waits for it:
a lock that cannot be had within 50 ms is tried for again next time, and meanwhile the log just grows. Should it fall so
far behind that the default partition takes rows, those rows stay there and the next partition begins behind them.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any, Final

import psycopg
from psycopg import errors

from outbox.sql import DEFAULT_SCHEMA, in_schema

log = logging.getLogger(__name__)

SIZE: Final = 1_000_000
"""Positions in one partition."""
AHEAD: Final = 2
"""Whole partitions that lie ready for writers."""
RETENTION: Final = timedelta(days=7)
"""How long delivered events are kept, for replay."""

_PARTITIONS = """
SELECT c.relname,
    regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \\(''?(-?\\d+)''?\\) TO \\(''?(-?\\d+)''?\\)')
FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE i.inhparent = '{schema}.outbox_event'::regclass
"""
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
        bounds = self._bounds()
        self._make_ahead(bounds)
        self._drop_passed(bounds)

    def _bounds(self) -> dict[str, tuple[int, int]]:
        rows = self._execute(_PARTITIONS)
        return {name: (int(found[0]), int(found[1])) for name, found in rows if found is not None}

    def _make_ahead(self, bounds: dict[str, tuple[int, int]]) -> None:
        (position,) = self._execute(_LAST_POSITION)[0]
        end = max((upper for _, upper in bounds.values()), default=0)
        if end < position:
            # Rows are in the default partition; a partition that overlaps them could not be attached.
            end = position + self._size
        while end < position + AHEAD * self._size:
            name = f"outbox_event_p{end:012d}"
            if not self._attempt(
                f"CREATE TABLE IF NOT EXISTS {{schema}}.{name} (LIKE {{schema}}.outbox_event INCLUDING ALL)",
                f"ALTER TABLE {{schema}}.outbox_event ATTACH PARTITION {{schema}}.{name} "
                f"FOR VALUES FROM ({end}) TO ({end + self._size})",
            ):
                return
            log.info("made partition %s of the log", name)
            end += self._size

    def _drop_passed(self, bounds: dict[str, tuple[int, int]]) -> None:
        (position,) = self._execute(_LAST_POSITION)[0]
        for name, (_, upper) in sorted(bounds.items()):
            if upper > position:
                return
            (old,) = self._execute(_NEWEST_IS_OLD.replace("{name}", name), self._retention)[0]
            if old is False or self._execute(_UNREAD.replace("{name}", name))[0][0]:
                return
            # A transaction that still writes into it holds a lock that the drop meets.
            if not self._attempt(f"DROP TABLE {{schema}}.{name}"):
                return
            log.info(
                "dropped partition %s of the log: delivered and older than %s",
                name,
                self._retention,
            )

    def _attempt(self, *statements: str) -> bool:
        try:
            with self._connection.transaction():
                self._connection.execute("SET LOCAL lock_timeout = '50ms'")
                for statement in statements:
                    self._connection.execute(in_schema(statement, self._schema).encode())
        except (
            errors.LockNotAvailable,
            errors.DuplicateTable,
            errors.UndefinedTable,
            errors.DeadlockDetected,
        ) as error:
            log.debug("left for next time: %s", error)
            return False
        return True

    def _execute(self, template: str, *params: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(
            in_schema(template, self._schema).encode(), params or None
        ).fetchall()
