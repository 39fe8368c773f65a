"""The relay's part in the rolls: it names what it has handed over, and says now and then where it stands.

The argument is in `outbox/rolls.py`. What matters here: a roll's cursor is stored, durably, before the roll is sent, so
that a roll which nobody gets is missed by the next one; only cursors whose events the broker has confirmed are stored;
and a relay that has lost a lane cannot store (the primary key and the lease say no). Rolls may therefore be lost
without harm, and a `BusError` here needs no more than a standing soon.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import psycopg

from outbox.buses.base import OutgoingMessage
from outbox.handed_over import HandedOver, Records
from outbox.ids import new_id
from outbox.reader import Cursor
from outbox.rolls import RECORD_BYTES, Entry, Roll, encode, text_of
from outbox.snapshot import IS_SAME_SERVER, Snapshot
from outbox.sql import DEFAULT_SCHEMA, in_schema

log = logging.getLogger(__name__)

STANDINGS: Final = (
    timedelta(seconds=10),
    timedelta(minutes=1),
    timedelta(minutes=10),
    timedelta(hours=1),
)
"""After how long a type that has become quiet is repeated, each time; the last one again and again."""

_SOON: Final = 16_000
_EVEN_IF_IDLE: Final = 60.0
_TIDY_EVERY: Final = 600.0
_MOST_AT_ONCE: Final = 40_000
_CUT_SHORT: Final = -1
_MOST_IN_A_MESSAGE: Final = 2_000
_NEVER: Final = datetime.fromtimestamp(0, UTC)

_WHO: Final = """
SELECT l.id, (SELECT queue FROM {schema}.outbox_worker ORDER BY noted_at DESC LIMIT 1) FROM {schema}.outbox_log AS l
"""
_NEWEST: Final = """
SELECT r.lane, r.seq, r.hi, r.snapshot::text, r.types FROM unnest(%(lanes)s::smallint[]) AS l (lane)
CROSS JOIN LATERAL (
    SELECT * FROM {schema}.outbox_roll AS r WHERE r.lane = l.lane ORDER BY r.seq DESC LIMIT 1
) AS r
"""
_STORE: Final = """
INSERT INTO {schema}.outbox_roll (lane, seq, hi, snapshot, types)
SELECT l.lane, l.seq, l.hi, l.snapshot::pg_snapshot, l.types::jsonb
FROM unnest(%(lanes)s::smallint[], %(epochs)s::bigint[], %(seqs)s::bigint[], %(his)s::bigint[], %(snapshots)s::text[],
    %(types)s::text[]) AS l (lane, epoch, seq, hi, snapshot, types)
WHERE l.epoch = (SELECT e.epoch FROM {schema}.outbox_lease AS e WHERE e.lane = l.lane ORDER BY e.epoch DESC LIMIT 1)
    AND {is_same_server}
ON CONFLICT DO NOTHING RETURNING lane
""".replace("{is_same_server}", IS_SAME_SERVER)
# What is delivered by the later cursor and was not by the earlier one; the three ranges are the reader's, and so are
# order and limit, which keep the planner to the indexes. Late rows are of any lane: the limit may cut off wanted ones.
DELIVERED_BETWEEN: Final = """
WITH lanes AS MATERIALIZED (
    SELECT * FROM unnest(%(lanes)s::smallint[], %(from_his)s::bigint[], %(his)s::bigint[]) AS l (lane, from_hi, hi)
), late AS MATERIALIZED (
    (SELECT f.* FROM unnest(%(running)s::text[]::xid8[]) AS r (xid) CROSS JOIN LATERAL (
        SELECT e.lane, e.position, e.xid, e.event_id, e.type FROM {schema}.outbox_event AS e
        WHERE e.xid = r.xid AND e.position <= %(highest)s ORDER BY e.xid, e.position LIMIT %(most)s
     ) AS f)
    UNION ALL
    (SELECT e.lane, e.position, e.xid, e.event_id, e.type FROM {schema}.outbox_event AS e
     WHERE e.xid >= %(next)s::text::xid8 AND e.xid < %(until_next)s::text::xid8 AND e.position <= %(highest)s
     ORDER BY e.xid, e.position LIMIT %(most)s)
), handed AS (
    SELECT f.* FROM lanes AS l CROSS JOIN LATERAL (
        SELECT e.lane, e.position, e.event_id, e.type FROM {schema}.outbox_event AS e
        WHERE e.lane = l.lane AND e.position > l.from_hi AND e.position <= l.hi
            AND pg_visible_in_snapshot(e.xid, %(until)s::pg_snapshot)
        ORDER BY e.position LIMIT %(most)s
    ) AS f
    UNION ALL
    SELECT late.lane, late.position, late.event_id, late.type
    FROM late JOIN lanes AS l ON l.lane = late.lane AND late.position <= l.from_hi AND late.position <= l.hi
    WHERE pg_visible_in_snapshot(late.xid, %(until)s::pg_snapshot)
)
"""
_COUNT: Final = f"{DELIVERED_BETWEEN} SELECT lane, type, count(*) FROM handed GROUP BY lane, type"  # noqa: S608
_NAME: Final = f"""{DELIVERED_BETWEEN}
SELECT lane, type, string_agg(uuid_send(event_id) || int8send(position), ''::bytea ORDER BY position)
FROM (SELECT * FROM handed LIMIT %(most)s) AS handed_over GROUP BY lane, type
UNION ALL SELECT {_CUT_SHORT}::smallint, '', NULL WHERE (SELECT count(*) FROM late) >= %(most)s
"""  # noqa: S608 - constants
# Each row stands for the difference to the row before it, so rows in between can go: that makes one roll of several.
_THIN_OUT: Final = """
DELETE FROM {schema}.outbox_roll AS old
WHERE old.called_at < clock_timestamp() - interval '1 hour' AND (
    SELECT date_bin('10 minutes', next.called_at, 'epoch') FROM {schema}.outbox_roll AS next
    WHERE next.lane = old.lane AND next.seq > old.seq ORDER BY next.seq LIMIT 1
) = date_bin('10 minutes', old.called_at, 'epoch')
"""
# What was handed over before the oldest of them is asked for from the beginning of the log.
_FORGET: Final = """
DELETE FROM {schema}.outbox_roll AS old
WHERE old.called_at < clock_timestamp() - CAST(%(age)s AS interval)
    AND EXISTS (SELECT FROM {schema}.outbox_roll AS next WHERE next.lane = old.lane AND next.seq > old.seq)
"""


@dataclass(slots=True)
class _Called:
    """The newest roll of one lane."""

    seq: int
    hi: int
    snapshot: Snapshot
    types: dict[str, tuple[int, datetime]] = field(default_factory=dict)
    """By type, the newest roll that named any of it, and when that was."""


@dataclass(slots=True)
class _Quiet:
    """When a type is to be repeated."""

    at: float
    times: int = 0


class RollCaller:
    """The rolls of the lanes that one relay holds, through a connection in autocommit."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        schema: str = DEFAULT_SCHEMA,
        *,
        every: timedelta = timedelta(seconds=5),
        standings: Sequence[timedelta] = STANDINGS,
        server: str | None = None,
    ) -> None:
        """*server*: as `CursorStore` has it."""
        self._connection = connection
        self._schema = schema
        self._server = server
        self._every = every.total_seconds()
        self._standings = [one.total_seconds() for one in standings]
        self._called: dict[int, _Called] = {}
        self._quiet: dict[str, _Quiet] = {}
        self._unnamed = 0
        self._handed = HandedOver(_MOST_AT_ONCE)
        self._called_at = self._tidy_at = 0.0
        self._log: UUID | None = None
        self._ask: str | None = None

    def load(self, cursors: Iterable[Cursor], epochs: Mapping[int, int]) -> None:
        """Go on from the stored rolls; a lane without any begins at its cursor in *cursors*."""
        self._handed.forget()
        wanted = {lane: cursor for cursor in cursors for lane in cursor.his}
        self._called = self._newest(wanted)
        new = {
            lane: _Called(0, cursor.his[lane], cursor.snapshot)
            for lane, cursor in wanted.items()
            if lane not in self._called
        }
        for lane in self._store(new, epochs):
            self._called[lane] = new[lane]
        self._called_at = time.monotonic()
        soon = self._called_at + self._standings[0]
        self._quiet = {type: _Quiet(soon) for one in self._called.values() for type in one.types}
        # Whoever held the lane may have died before it named what it had handed over: that is looked up at once, while
        # it is not much, and what comes after it is remembered.
        self._unnamed = _SOON

    def handed_over(self, events: int, records: Records) -> None:
        """The broker has confirmed so many *events*, which *records* are of, and with them the cursor they end at."""
        self._unnamed += events
        self._handed.add(records)

    def messages(
        self, cursors: Iterable[Cursor], epochs: Mapping[int, int]
    ) -> list[OutgoingMessage]:
        """The rolls and standings that are due now, up to the confirmed *cursors*."""
        now = time.monotonic()
        since = now - self._called_at
        if since >= (self._every if self._unnamed else _EVEN_IF_IDLE) or self._unnamed >= _SOON:
            self._called_at, self._unnamed = now, 0
            return self._call(list(cursors), epochs, now)
        return self._say_standings(now)

    def unsaid(self, messages: Iterable[OutgoingMessage]) -> None:
        """The broker did not take *messages*: say soon where their types stand."""
        for message in messages:
            self._quiet[message.type] = _Quiet(time.monotonic() + self._every)

    def tidy(self, retention: timedelta) -> None:
        """Make one of old rolls that follow each other, and forget those beyond *retention*."""
        now = time.monotonic()
        if now < self._tidy_at:
            return
        self._tidy_at = now + _TIDY_EVERY
        self._execute(_THIN_OUT)
        self._execute(_FORGET, age=retention + timedelta(days=1))

    def _call(
        self, cursors: Sequence[Cursor], epochs: Mapping[int, int], now: float
    ) -> list[OutgoingMessage]:
        self._log, self._ask = self._execute(_WHO)[0]
        named: dict[tuple[int, str], bytes | None] = {}
        called: dict[int, _Called] = {}
        before = self._called
        at = datetime.now(UTC)
        for cursor in cursors:
            lanes = [lane for lane in cursor.his if lane in before and lane in epochs]
            unknown = [lane for lane in lanes if not self._handed.knows(lane)]
            for snapshot in {before[lane].snapshot.text for lane in unknown}:
                group = [lane for lane in unknown if before[lane].snapshot.text == snapshot]
                named |= self._name(group, cursor)
            named |= self._handed.take(lanes)
            for lane in lanes:
                last = before[lane]
                called[lane] = _Called(
                    last.seq + 1, cursor.his[lane], cursor.snapshot, dict(last.types)
                )
        for lane, type in named:
            called[lane].types[type] = (called[lane].seq, at)
        stored = set(self._store(called, epochs))
        self._handed.begin(stored)
        if stored != called.keys():
            log.info("rolls of lanes %s are another relay's now", sorted(called.keys() - stored))
        self._called = {**before, **{lane: called[lane] for lane in stored}}
        for type in {type for _, type in named}:
            self._quiet[type] = _Quiet(now + self._standings[0])
        return [
            message
            for type in sorted({type for _, type in named})
            for message in self._roll(
                type, [lane for lane, its in named if its == type and lane in stored], named, before
            )
        ]

    def _roll(
        self,
        type: str,
        lanes: Sequence[int],
        named: Mapping[tuple[int, str], bytes | None],
        before: Mapping[int, _Called],
    ) -> Iterable[OutgoingMessage]:
        entries: list[Entry] = []
        packed = b""
        for lane in sorted(lanes):
            records = named[lane, type]
            seq = self._called[lane].seq
            previous, previous_at = before[lane].types.get(type, (0, _NEVER))
            if records is None:
                # Too many for messages: who takes this one will ask for them, page by page.
                entries.append(self._standing_entry(lane, type))
                continue
            count = len(records) // RECORD_BYTES
            entries.append(
                Entry(lane=lane, seq=seq, previous=previous, previous_at=previous_at, count=count)
            )
            packed += records
            if len(packed) >= _MOST_IN_A_MESSAGE * RECORD_BYTES:
                yield self._message(type, entries, packed)
                entries, packed = [], b""
        if entries:
            yield self._message(type, entries, packed)

    def _say_standings(self, now: float) -> list[OutgoingMessage]:
        messages = []
        for type, quiet in self._quiet.items():
            if quiet.at > now:
                continue
            wait = self._standings[min(quiet.times + 1, len(self._standings) - 1)]
            quiet.at, quiet.times = now + wait, quiet.times + 1
            lanes = [lane for lane, one in self._called.items() if type in one.types]
            if lanes and self._log is not None:
                entries = [self._standing_entry(lane, type) for lane in sorted(lanes)]
                messages.append(self._message(type, entries, b""))
        return messages

    def _standing_entry(self, lane: int, type: str) -> Entry:
        seq, at = self._called[lane].types[type]
        return Entry(lane=lane, seq=seq, previous=seq, previous_at=at)

    def _message(self, type: str, entries: Sequence[Entry], packed: bytes) -> OutgoingMessage:
        assert self._log is not None
        # Not looked through as one that has come in: its records alone may be 64 kB.
        roll = Roll.model_construct(
            log=self._log, type=type, ask=self._ask, entries=tuple(entries), records=text_of(packed)
        )
        return OutgoingMessage(str(new_id()), type, None, encode(roll), entries[0].lane, 0)

    def _name(self, lanes: Sequence[int], cursor: Cursor) -> dict[tuple[int, str], bytes | None]:
        """By lane and type: what is to be named, None where that is too much for a message."""
        params = difference(
            [(lane, self._called[lane].hi, cursor.his[lane]) for lane in lanes],
            self._called[lanes[0]].snapshot,
            cursor.snapshot,
        )
        found = {
            (lane, type): packed
            for lane, type, packed in self._execute(_NAME, **params, most=_MOST_AT_ONCE + 1)
        }
        if all(found.values()) and sum(map(len, found.values())) <= _MOST_AT_ONCE * RECORD_BYTES:
            return found
        return {(lane, type): None for lane, type, _ in self._execute(_COUNT, **params, most=None)}

    def _newest(self, lanes: Iterable[int]) -> dict[int, _Called]:
        return {
            lane: _Called(
                seq,
                hi,
                Snapshot(snapshot),
                {type: (n, datetime.fromisoformat(at)) for type, (n, at) in types.items()},
            )
            for lane, seq, hi, snapshot, types in self._execute(_NEWEST, lanes=list(lanes))
        }

    def _store(self, called: Mapping[int, _Called], epochs: Mapping[int, int]) -> list[int]:
        if not called:
            return []
        rows = self._execute(
            _STORE,
            lanes=list(called),
            epochs=[epochs[lane] for lane in called],
            seqs=[one.seq for one in called.values()],
            his=[one.hi for one in called.values()],
            snapshots=[one.snapshot.text for one in called.values()],
            types=[
                json.dumps({type: (n, at.isoformat()) for type, (n, at) in one.types.items()})
                for one in called.values()
            ],
            server=self._server,
        )
        return [lane for (lane,) in rows]

    def _execute(self, template: str, **params: Any) -> list[tuple[Any, ...]]:
        cursor = self._connection.execute(in_schema(template, self._schema).encode(), params)
        return cursor.fetchall() if cursor.description else []


def difference(
    lanes: Sequence[tuple[int, int, int]], earlier: Snapshot, later: Snapshot
) -> dict[str, Any]:
    """The parameters of `DELIVERED_BETWEEN`: *lanes* with their highest positions then and later."""
    return {
        "lanes": [lane for lane, _, _ in lanes],
        "from_his": [then for _, then, _ in lanes],
        "his": [now for _, _, now in lanes],
        "highest": max((then for _, then, _ in lanes), default=0),
        "running": earlier.running,
        "next": str(earlier.next),
        "until": later.text,
        "until_next": str(later.next),
    }
