"""Reading the log: one page after another, from a cursor that nothing can stretch.

A cursor is `(hi per lane, S)`: the highest position delivered of each lane, and the snapshot of the statement that
delivered it, or any higher one that had been drawn by then, where nothing visible lies between. The invariant is

    delivered = { position <= hi of its lane and visible in S }

A page is three index ranges: *fresh* rows above `hi`, and two arms of *stragglers*, rows at or below `hi` that have
been committed since S. Why the arms miss none: a row at or below `hi` was numbered before the statement of S ended, and
a transaction gets its xid before its first position (the column order of `outbox_event` sees to that), so its xid was
drawn before; as the row is not visible in S, its xid was running in S (first arm: `xip` of S) or lay at or above S's
xmax (second arm), which is not the next xid but one past the newest *completed* one. Why nothing comes twice: a row
visible in S has an xid in neither arm. Why nobody waits: an open transaction is one number in a list.

Rows of one key come in the order of their commits: a later writer of the key got its lock only after the earlier one
had ended, so every snapshot that shows the later shows the earlier, at a lower position; and within a lane stragglers
go before fresh rows, each by position.

A page costs its rows, also where millions are still to be read: the log has a partition for each million positions, and
the first row of each would be looked for in every lane. So while there is more than a page takes, *fresh* ends with the
partition after that of `hi`. A lane with less to say than others goes on with them: its `hi` is raised to the highest
of the page, as whatever is below and not visible by then is a straggler like any other.

The idea of reading between two snapshots is PgQ's; it needs a ticker and bounds that one late commit can stretch. This
form needs neither.

A page can be asked for before it is wanted, as its cursor is known once the page before it has come: then PostgreSQL
makes it while Python sends that one. It is a page after its cursor whenever it is taken, only an older one; so it is
taken for that very cursor object, and dropped wherever reading goes on from another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row

from outbox.buses.base import OutgoingMessage
from outbox.partitions import SIZE
from outbox.snapshot import FIRST_XID, NOTHING_SEEN, SERVER, Snapshot
from outbox.sql import DEFAULT_SCHEMA, in_schema
from outbox.standing_query import StandingQuery

MESSAGE: Final = "e.event_id::text, e.type, e.key, e.body, e.lane, e.position, e.key_seq"
"""The columns of an `OutgoingMessage`, from `outbox_event AS e`."""

_SNAPSHOT_LANE: Final = -100

# `ANY` of four times the same: two plain bounds of a column the planner takes for a narrow range whatever they are, and
# may then fetch and sort all of it, up to a million rows. Of an `ANY` with four it guesses that four fifths are in it.
_FRESH = f"""
SELECT f.* FROM unnest(%(lanes)s::smallint[], %(his)s::bigint[], %(ends)s::bigint[]) AS l (lane, hi, "end")
CROSS JOIN LATERAL (
    SELECT {MESSAGE}, NULL::text, NULL::text FROM {{schema}}.outbox_event AS e
    WHERE e.lane = l.lane AND e.position > l.hi AND e.position < ANY (ARRAY[l."end", l."end", l."end", l."end"])
    ORDER BY e.position LIMIT %(rows)s
) AS f
"""  # noqa: S608 - constants
# Lanes are picked out by the caller, and what is not below `hi` of its own lane: a condition on `lane` would offer the
# planner the primary key, and with it the whole history. For the same end the xids are looked up one by one, and rows
# come in the order of the index `(xid, position)`: for `xid = ANY(...)` a generic plan, made for a log that few large
# transactions have written, goes through all positions. The lane comes turned over: that tells them from fresh rows.
_LATE = f"""
SELECT {MESSAGE.replace("e.lane", "~e.lane")}, NULL::text, NULL::text FROM {{schema}}.outbox_event AS e
"""  # noqa: S608 - constants
_ENDED_SINCE = f"""
(SELECT f.* FROM unnest(%(running)s::text[]::xid8[]) AS r (xid) CROSS JOIN LATERAL (
    {_LATE}
    WHERE e.xid = r.xid AND e.position <= %(highest)s ORDER BY e.xid, e.position LIMIT %(rows)s + 1
) AS f LIMIT %(rows)s + 1)
"""  # noqa: S608 - constants
_BEGUN_SINCE = f"""
({_LATE}
WHERE e.xid >= %(next)s::text::xid8 AND e.xid < %(ceiling)s::text::xid8 AND e.position <= %(highest)s
ORDER BY e.xid, e.position LIMIT %(rows)s + 1)
"""
# One more row brings the snapshot that all the others were seen in, and how far the log is durable.
_SEEN_IN = f"""
SELECT NULL::text, pg_current_snapshot()::text, {SERVER}, NULL::bytea, {_SNAPSHOT_LANE}::smallint,
    (pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn())::bigint, NULL::bigint, NULL::text, NULL::text
"""
_ARMS: Final = {"fresh": _FRESH, "ended": _ENDED_SINCE, "begun": _BEGUN_SINCE}

_LATE_POSITIONS = """
SELECT e.position, e.lane FROM {schema}.outbox_event AS e
WHERE (e.xid = ANY(%(running)s::text[]::xid8[]) OR (e.xid >= %(next)s::text::xid8 AND e.xid < %(ceiling)s::text::xid8))
    AND e.position <= %(highest)s AND pg_visible_in_snapshot(e.xid, %(until)s::pg_snapshot)
ORDER BY e.position
"""
_AT_POSITIONS = f"""
SELECT {MESSAGE}, NULL::text, NULL::text FROM {{schema}}.outbox_event AS e
JOIN unnest(%(lanes)s::smallint[], %(positions)s::bigint[]) AS l (lane, position) USING (lane, position)
ORDER BY e.position
"""  # noqa: S608 - constants
_ANY_SNAPSHOT = "SELECT pg_current_snapshot()::text"
# A commit that waits for the disk makes everything before it durable. One statement, one round trip: it sets how the
# transaction that it is will be committed.
_FLUSH = """
SELECT pg_current_xact_id()::text, set_config('synchronous_commit', 'on', true),
    pg_logical_emit_message(true, 'outbox', '')
"""

_HUGE: Final = 2**63 - 1
_LANE: Final = attrgetter("lane")
_POSITION: Final = attrgetter("position")
_message: Final = partial(tuple.__new__, OutgoingMessage)
"""`OutgoingMessage._make`, without a frame of Python for each row."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far some lanes have been read: the lanes that were last read by one statement."""

    his: Mapping[int, int]
    """By lane: what is visible up to this position has been delivered."""
    snapshot: Snapshot = NOTHING_SEEN
    ceiling: int = _HUGE
    """An xid that no transaction had when `snapshot` was taken. It keeps the second arm short for a cursor that has
    lain in the database; for one that is milliseconds old it does nothing."""
    late: tuple[tuple[int, int], ...] = ()
    """Stragglers (position, lane) of a huge late transaction that are still to be delivered before anything else."""
    late_until: Snapshot | None = None

    @classmethod
    def at_beginning(cls, lanes: Iterable[int]) -> Cursor:
        """Before the first event."""
        return cls(dict.fromkeys(lanes, 0), NOTHING_SEEN, FIRST_XID)


@dataclass(frozen=True, slots=True)
class Page:
    """Events in the order in which they must be sent, and the cursor once they have been."""

    events: list[OutgoingMessage]
    cursor: Cursor
    complete: bool
    """Whether this was everything that was there: the next read can wait a little."""


class LogReader:
    """Reads pages through one connection, which is in autocommit: no snapshot is held between two reads.

    The connection is the reader's alone, so that nothing else meets the answer of a page that was asked for ahead.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        schema: str = DEFAULT_SCHEMA,
        *,
        server: str | None = None,
        arms: Iterable[str] = tuple(_ARMS),
    ) -> None:
        """*server*: whose cursors are read on from (`outbox.snapshot.SERVER`); None: whichever answers first.

        *arms* exists for the tests that show what each arm is for.
        """
        self._connection = connection
        self._schema = schema
        self._server = server
        parts = [_ARMS[arm] for arm in arms]
        self._page_sql = in_schema("\nUNION ALL ".join([*parts, _SEEN_IN]), schema)
        self._page = StandingQuery(connection, self._page_sql)
        self._now = StandingQuery(connection, _ANY_SNAPSHOT)
        self._asked: tuple[Cursor, int, Mapping[int, int]] | None = None
        self._has_more = False
        """Whether the last page of fresh events left some of a lane for the next one."""
        self._durable, self._flushed_by = NOTHING_SEEN, 0
        """All that is visible in the snapshot would survive a crash of the server; the transaction that saw to it."""

    def read(self, cursor: Cursor, rows: int, *, durable: bool = True) -> Page:
        """The next page after *cursor*: at most *rows* fresh events of each lane, and the stragglers.

        Raises psycopg's `OperationalError` if it is another server that answers.
        Unless *durable* is False, everything in the page will survive a crash of the server. A page that was asked for
        ahead has as many rows as were asked for then.
        """
        if cursor.late:
            return self._late_page(cursor, rows)
        if self._asked is None or self._asked[0] is not cursor:
            self._ask(cursor, rows)
        assert self._asked is not None
        _, rows, ends = self._asked
        self._asked = None
        found = self._page.rows(_message)
        lanes = list(map(_LANE, found))
        others: list[OutgoingMessage] = []
        if lanes[-1] != _SNAPSHOT_LANE or min(lanes[:-1], default=0) < 0:
            others = [row for row in found if row.lane < 0]
            fresh = [row for row in found if row.lane >= 0]
            last = next(row for row in others if row.lane == _SNAPSHOT_LANE)
        else:
            fresh, last = found, found.pop()
        seen, not_durable, server = Snapshot(last.type), last.position, last.key
        if server != (self._server or server):
            raise psycopg.OperationalError("a pooler has put another server in the place of ours")
        self._server = server
        if len(others) - 1 > rows:
            # An arm may have met its limit, with rows that are not ours: count, and go page by page.
            crowded = self._with_late(cursor, seen)
            if crowded.late:
                return self._late_page(crowded, rows)
        fresh.sort(key=_POSITION)
        lanes = list(map(_LANE, fresh))
        his = {**cursor.his, **dict(zip(lanes, map(_POSITION, fresh), strict=True))}
        counts, top = Counter(lanes), max(his.values(), default=0)
        for lane, end in ends.items():
            if counts[lane] < rows:
                his[lane] = max(his[lane], min(end - 1, top))
        self._has_more = max(counts.values(), default=0) >= rows
        complete = not self._has_more and _HUGE in ends.values()
        late = [
            row._replace(lane=~row.lane)
            for row in others
            if row.position <= cursor.his.get(~row.lane, -1)
        ]
        events = sorted([*late, *fresh], key=_POSITION) if late else fresh
        if not_durable <= 0:
            self._durable = seen
        elif events and durable:
            self._see_to_durability(seen)
        return Page(events, Cursor(his, seen), complete)

    def read_ahead(self, cursor: Cursor, rows: int) -> None:
        """Have PostgreSQL begin with what `read` is asked for next. To be settled before anything that waits."""
        if not cursor.late:
            self._ask(cursor, rows)

    def settle(self) -> None:
        """Have the page that was asked for ahead in memory: from now on the server holds no snapshot for it."""
        self._page.settle()

    def forget(self) -> None:
        """Drop the page that was asked for ahead."""
        self._asked = None
        self._page.forget()

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """What is read within has one snapshot."""
        self.forget()
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield

    def _ask(self, cursor: Cursor, rows: int) -> None:
        ends = self._ends(cursor)
        self._page.ask(self._given(cursor, rows, ends))
        self._asked = cursor, rows, ends

    def _ends(self, cursor: Cursor) -> dict[int, int]:
        """The positions at which *fresh* ends, by lane: it is below them."""
        return {
            lane: (hi // SIZE + 2) * SIZE if self._has_more else _HUGE
            for lane, hi in cursor.his.items()
        }

    def _given(self, cursor: Cursor, rows: int, ends: Mapping[int, int]) -> dict[str, Any]:
        return {
            "lanes": list(cursor.his),
            "his": list(cursor.his.values()),
            "ends": list(ends.values()),
            "rows": rows,
            "highest": max(cursor.his.values(), default=0),
            **self._since(cursor),
        }

    def unchanged_since(self, cursor: Cursor) -> bool:
        """Whether no transaction at all has ended since *cursor* was read: then there is nothing to read."""
        self._page.settle()
        self._now.ask({})
        ((now,),) = self._now.rows(tuple)
        return bool(now == cursor.snapshot.text)

    def _with_late(self, cursor: Cursor, until: Snapshot) -> Cursor:
        """A huge transaction has committed late: note its positions, to deliver them page by page."""
        with self._connection.transaction():
            # Seldom run, and a generic plan, which the relay's connection is set to, could go through all positions.
            self._connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
            found = self._rows(
                in_schema(_LATE_POSITIONS, self._schema),
                prepare=False,
                highest=max(cursor.his.values()),
                until=until.text,
                **self._since(cursor),
            )
        late = tuple(
            (position, lane) for position, lane in found if position <= cursor.his.get(lane, -1)
        )
        return replace(cursor, late=late, late_until=until)

    def _late_page(self, cursor: Cursor, rows: int) -> Page:
        self.forget()
        most = rows * len(cursor.his)
        page, rest = cursor.late[:most], cursor.late[most:]
        events = self._messages(
            in_schema(_AT_POSITIONS, self._schema),
            lanes=[lane for _, lane in page],
            positions=[position for position, _ in page],
        )
        assert cursor.late_until is not None
        self._see_to_durability(cursor.late_until)
        if rest:
            return Page(events, replace(cursor, late=rest), complete=False)
        return Page(events, Cursor(cursor.his, cursor.late_until), complete=False)

    def _since(self, cursor: Cursor) -> dict[str, Any]:
        return {
            "running": cursor.snapshot.running,
            "next": str(cursor.snapshot.next),
            "ceiling": str(cursor.ceiling),
        }

    def make_durable(self) -> int:
        """`make_durable` on the reader's connection."""
        return make_durable(self._connection)

    def _see_to_durability(self, seen: Snapshot) -> None:
        # There is always some WAL that is not on disk yet, as reading alone writes it (hint bits, with checksums). But
        # what could be seen before the last flush was on disk with it, whatever has been written since.
        if seen.shows_more_than(self._durable, self._flushed_by):
            self._flushed_by = self.make_durable()
            self._durable = seen

    def _messages(self, sql: str, **params: Any) -> list[OutgoingMessage]:
        return [_message(row) for row in self._rows(sql, **params)]

    def _rows(self, sql: str, *, prepare: bool = True, **params: Any) -> list[tuple[Any, ...]]:
        with self._connection.cursor(row_factory=tuple_row, binary=True) as cursor:
            cursor.execute(sql.encode(), params, prepare=prepare)
            return cursor.fetchall()


def make_durable(connection: psycopg.Connection[Any]) -> int:
    """Events of writers with `synchronous_commit=off` can be seen before a crash would keep them: have all kept.

    Returns the xid of the transaction that it took.
    """
    ((xid, *_),) = connection.execute(_FLUSH).fetchall()
    return int(xid)
