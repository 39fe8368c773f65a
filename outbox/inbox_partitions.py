"""The inbox by days: partitions made ahead, and forgotten once the dedupe window has passed.

Event ids are UUIDv7, so a day of events is a range of ids. Forgetting a day is truncating its
partition, which locks that partition only; nobody uses it, as events that old are refused. The
empty table is dropped when its parent can be locked without keeping anyone waiting.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from outbox.sql import DEFAULT_SCHEMA, briefly, in_schema
from outbox.statements import statement
from outbox.transient import is_lock_timeout

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"inbox_p(\d{8})")
_ONE_DAY: Final = timedelta(days=1)
_STRAYS_AT_ONCE: Final = 10_000

# One process at a time; nobody waits, as whoever holds it is doing the same work.
_TRY_TURN = "SELECT pg_try_advisory_xact_lock(hashtext('{schema}.inbox partitions'))"
_TODAY = "SELECT (now() AT TIME ZONE 'UTC')::date"
_PARTITIONS = """
SELECT child.relname FROM pg_inherits
JOIN pg_class child ON child.oid = inhrelid
WHERE inhparent = '{schema}.inbox'::regclass
"""
_DROP_STRAYS = """
DELETE FROM {schema}.inbox_default WHERE ctid IN (
    SELECT ctid FROM {schema}.inbox_default
    WHERE received_at < now() - CAST(:age AS interval) LIMIT :limit
)
"""


@dataclass
class Upkeep:
    """What was done to the inbox."""

    made: list[str] = field(default_factory=list)
    emptied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    strays: int = 0
    """Rows outside of any day's partition that were deleted."""


def maintain(
    engine: Engine,
    *,
    window: timedelta,
    days_ahead: int = 3,
    schema: str = DEFAULT_SCHEMA,
) -> Upkeep:
    """Make the partitions of the days to come and forget those beyond *window*. Safe at any time.

    Needs a role that owns the tables. A lock that is not had soon is left for the next time.
    """
    done = Upkeep()
    table = _Inbox(engine, schema)
    today, days = table.look()
    for day in (today + timedelta(days=offset) for offset in range(days_ahead + 1)):
        if day not in days and table.make(day):
            done.made.append(_name(day))
    # A day more than the window, for clocks that differ.
    forgotten = sorted(day for day in days if day < today - window - _ONE_DAY)
    done.emptied = [_name(day) for day in forgotten if table.empty(day)]
    done.dropped = [_name(day) for day in forgotten if table.drop(day)]
    done.strays = table.delete_strays(window + _ONE_DAY)
    if done != Upkeep():
        log.info("inbox of schema %s: %s", schema, done)
    return done


def day_bounds(day: date) -> tuple[UUID, UUID]:
    """The smallest UUIDv7 of *day* (UTC) and that of the day after."""
    start = datetime.combine(day, time(), tzinfo=UTC)
    return _smallest_id(start), _smallest_id(start + _ONE_DAY)


def _smallest_id(moment: datetime) -> UUID:
    # The bare timestamp, without version bits: it sorts before every id of that millisecond.
    return UUID(int=(int(moment.timestamp()) * 1000) << 80)


@dataclass(frozen=True)
class _Inbox:
    engine: Engine
    schema: str

    def look(self) -> tuple[date, set[date]]:
        """Today, by the database's clock, and the days that have a partition."""
        with self.engine.begin() as connection:
            today: date = connection.execute(statement(_TODAY, self.schema)).scalar_one()
            return today, self._days(connection)

    def make(self, day: date) -> bool:
        first, end = day_bounds(day)
        # Events from clocks that run ahead may have rows in the default partition already.
        return self._in_turn("2s", day, False, [
            "CREATE TABLE {schema}.%s (LIKE {schema}.inbox INCLUDING ALL)",
            "LOCK TABLE {schema}.inbox_default IN ACCESS EXCLUSIVE MODE",
            f"WITH moved AS (DELETE FROM {{schema}}.inbox_default WHERE event_id >= '{first}' "  # noqa: S608
            f"AND event_id < '{end}' RETURNING *) INSERT INTO {{schema}}.%s SELECT * FROM moved",
            "ALTER TABLE {schema}.inbox ATTACH PARTITION {schema}.%s "
            f"FOR VALUES FROM ('{first}') TO ('{end}')",
        ])  # fmt: skip

    def empty(self, day: date) -> bool:
        return self._in_turn("2s", day, True, ["TRUNCATE {schema}.%s"])

    def drop(self, day: date) -> bool:
        # The shortest of waits: meanwhile every delivery waits behind it.
        return self._in_turn("100ms", day, True, ["DROP TABLE {schema}.%s"])

    def delete_strays(self, age: timedelta) -> int:
        with self.engine.begin() as connection:
            deleted = connection.execute(
                statement(_DROP_STRAYS, self.schema), {"age": age, "limit": _STRAYS_AT_ONCE}
            )
            return max(0, deleted.rowcount)

    def _in_turn(self, lock_timeout: str, day: date, exists: bool, sqls: Sequence[str]) -> bool:
        """Run *sqls* on the day's table, if it *exists* or not; False where that was not to be.

        False also where someone else is at it, or a lock was not had.
        """
        try:
            with self.engine.begin() as connection:
                has_turn = connection.execute(statement(_TRY_TURN, self.schema)).scalar_one()
                if not has_turn or (day in self._days(connection)) is not exists:
                    return False
                connection.execute(text(briefly(lock_timeout)))
                for sql in sqls:
                    # Not `statement`, whose cache is for texts that come again.
                    connection.execute(text(in_schema(sql.replace("%s", _name(day)), self.schema)))
        except DBAPIError as error:
            if is_lock_timeout(error):
                return False
            raise
        return True

    def _days(self, connection: Connection) -> set[date]:
        names = connection.execute(statement(_PARTITIONS, self.schema)).scalars()
        matches = (_NAME.fullmatch(name) for name in names)
        return {datetime.strptime(m[1], "%Y%m%d").date() for m in matches if m}  # noqa: DTZ007


def _name(day: date) -> str:
    return f"inbox_p{day:%Y%m%d}"
