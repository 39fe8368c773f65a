"""Stored cursors: inserted, never updated, so that a held xmin horizon cannot make them rot.

The newest row of a lane is the last entry of an index, which no dead row stands before. Rows go into one of three small
tables; now and then the next one is taken into use and the one after it is emptied with TRUNCATE, which gives the space
back whatever old transactions are open.

Fencing: rows are ordered by `(epoch, seq)`, and the epoch is that of the lane's lease. So a relay that was paused, and
whose lane somebody else has taken, can still insert, even between the other's lease and the other's first cursor; but
its row is older than any of the new epoch, and is never the newest again. The insert looks at the lease as well and
fails with `LeaseLost`, so that the relay notices.

Another server's cursors are not stored: behind a pooler, the server may have been replaced by one that lacks the last
commits, and has given their positions to other events.

Losing the last rows (they are not waited for at commit) only means that events are sent twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import psycopg
from psycopg import errors

from outbox.errors import LeaseLost
from outbox.reader import Cursor
from outbox.snapshot import IS_SAME_SERVER, Snapshot
from outbox.sql import DEFAULT_SCHEMA, briefly, in_schema

SLOTS: Final = 3

# The setting is local to the transaction, which is this statement, and its commit does not wait for the disk.
_STORE = """
WITH unawaited AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
INSERT INTO {schema}.outbox_cursor (slot, lane, epoch, seq, hi, snapshot)
SELECT %(slot)s, l.lane, l.epoch, %(seq)s, l.hi, %(snapshot)s::pg_snapshot
FROM unawaited, unnest(%(lanes)s::smallint[], %(epochs)s::bigint[], %(his)s::bigint[]) AS l (lane, epoch, hi)
WHERE l.epoch = (SELECT e.epoch FROM {schema}.outbox_lease AS e WHERE e.lane = l.lane ORDER BY e.epoch DESC LIMIT 1)
    AND {is_same_server}
RETURNING lane
""".replace("{is_same_server}", IS_SAME_SERVER)
_NEWEST = """
SELECT c.lane, c.hi, c.snapshot::text, c.ceil::text::bigint, c.seq, c.slot
FROM unnest(%(lanes)s::smallint[]) AS l (lane)
CROSS JOIN LATERAL (
    SELECT * FROM {schema}.outbox_cursor AS c WHERE c.lane = l.lane ORDER BY c.epoch DESC, c.seq DESC LIMIT 1
) AS c
"""
_IN_USE = """
SELECT slot, count(*), min(seq) FROM {schema}.outbox_cursor GROUP BY slot
"""
_COPY_TO = """
INSERT INTO {schema}.outbox_cursor (slot, lane, epoch, seq, hi, snapshot, ceil)
SELECT %(to)s, c.lane, c.epoch, c.seq, c.hi, c.snapshot, c.ceil FROM (
    SELECT DISTINCT ON (lane) * FROM {schema}.outbox_cursor ORDER BY lane, epoch DESC, seq DESC
) AS c
ON CONFLICT DO NOTHING
"""


class CursorStore:
    """The cursors of one log, through a connection in autocommit."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        schema: str = DEFAULT_SCHEMA,
        *,
        server: str | None = None,
    ) -> None:
        """*server*: the one whose cursors they are (`outbox.snapshot.SERVER`); on any other none is stored."""
        self._connection = connection
        self._schema = schema
        self._server = server
        self._seq = 0
        self._slot = 0

    def load(self, lanes: Iterable[int]) -> list[Cursor]:
        """The stored cursors of *lanes*, lanes read by one statement together; at the beginning where there is none."""
        wanted = list(lanes)
        rows = self._connection.execute(self._sql(_NEWEST), {"lanes": wanted}).fetchall()
        groups: dict[tuple[str, int], dict[int, int]] = {}
        for lane, hi, snapshot, ceiling, seq, slot in rows:
            groups.setdefault((snapshot, ceiling), {})[lane] = hi
            if seq >= self._seq:
                self._seq, self._slot = seq, slot
        cursors = [Cursor(his, Snapshot(text), ceiling) for (text, ceiling), his in groups.items()]
        unread = set(wanted) - {lane for cursor in cursors for lane in cursor.his}
        return cursors + ([Cursor.at_beginning(sorted(unread))] if unread else [])

    def store(self, cursor: Cursor, epochs: Mapping[int, int]) -> None:
        """Store how far the lanes have been read *and confirmed*. Raises `LeaseLost`, storing the others' lanes."""
        if not cursor.his:
            return
        self._seq += 1
        params = {
            "slot": self._slot,
            "seq": self._seq,
            "lanes": list(cursor.his),
            "epochs": [epochs[lane] for lane in cursor.his],
            "his": list(cursor.his.values()),
            "snapshot": cursor.snapshot.text,
            "server": self._server,
        }
        stored = self._connection.execute(self._sql(_STORE), params).fetchall()
        lost = sorted(cursor.his.keys() - {lane for (lane,) in stored})
        if lost:
            raise LeaseLost(
                f"lanes {lost} belong to another relay now; what was sent twice is dropped by the inboxes"
            )

    def rotate(self, when_over: int = 20_000) -> bool:
        """Move to the next table once this one has more than *when_over* rows, and empty the one after that.

        Gives up quietly, to be called again, where a lock cannot be had at once: nobody waits for this. Only the relay
        that holds lane 0 need call it.
        """
        counts = {
            slot: count
            for slot, count, _ in self._connection.execute(self._sql(_IN_USE)).fetchall()
        }
        if counts.get(self._slot, 0) <= when_over:
            return False
        following, oldest = (self._slot + 1) % SLOTS, (self._slot + 2) % SLOTS
        try:
            with self._connection.transaction():
                self._connection.execute(briefly("50ms").encode())
                # Every lane's newest row goes along, so that the emptied table held nobody's last word.
                self._connection.execute(self._sql(_COPY_TO), {"to": following})
                self._connection.execute(self._sql(f"TRUNCATE {{schema}}.outbox_cursor_{oldest}"))
        except (errors.LockNotAvailable, errors.DeadlockDetected):
            return False
        self._slot = following
        return True

    def _sql(self, template: str) -> bytes:
        return in_schema(template, self._schema).encode()
