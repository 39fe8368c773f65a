"""Which relay reads which lane: leases in the database, with an epoch that every cursor write checks.

A lease is a row `(lane, epoch, relay)`; whoever inserts the next epoch of a lane has it, and the primary key lets one
of two win. It holds while its relay's heartbeat does, by the database's clock. A relay trusts itself only until its own
last heartbeat *began* plus the time to live, less a margin, by its monotonic clock: what was sent after that may be
sent by the new owner too (the inbox drops the copy), but never moves a cursor (`outbox.cursors`).

Nothing rests on a session: no advisory lock, no setting; any connection of a transaction pooler will do.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg

from outbox.publishing import LANES
from outbox.sql import DEFAULT_SCHEMA, in_schema

TIME_TO_LIVE: Final = timedelta(seconds=3)
BEAT_EVERY: Final = timedelta(seconds=1)
_MARGIN: Final = timedelta(milliseconds=500)

_BEAT = """
INSERT INTO {schema}.outbox_heartbeat (relay_id, seq, expires_at, host)
VALUES (%(relay)s, %(seq)s, clock_timestamp() + %(ttl)s, %(host)s)
"""
# Some sixty rows a minute per relay. While the xmin horizon is held they stay as dead ones, and what is asked every
# second has to pass them by: both questions read an index from its newest end, to a bound.
_FORGET_BEATS = """
DELETE FROM {schema}.outbox_heartbeat WHERE expires_at < clock_timestamp() - interval '1 minute'
"""
_FORGET_LEASES = """
DELETE FROM {schema}.outbox_lease AS old
USING (SELECT lane, max(epoch) AS newest FROM {schema}.outbox_lease GROUP BY lane) AS l
WHERE old.lane = l.lane AND old.epoch < l.newest - 10
"""
_LIVE = """
SELECT DISTINCT relay_id FROM (
    SELECT relay_id FROM {schema}.outbox_heartbeat WHERE expires_at > statement_timestamp()
    ORDER BY expires_at DESC LIMIT 10000
) AS live
"""
_HOLDERS = """
SELECT l.lane, l.epoch, l.relay_id FROM generate_series(0, 15) AS lanes (lane)
CROSS JOIN LATERAL (
    SELECT * FROM {schema}.outbox_lease AS e WHERE e.lane = lanes.lane ORDER BY e.epoch DESC LIMIT 1
) AS l
"""
_CLAIM = """
INSERT INTO {schema}.outbox_lease (lane, epoch, relay_id)
SELECT * FROM unnest(%(lanes)s::smallint[], %(epochs)s::bigint[], %(relays)s::uuid[])
ON CONFLICT DO NOTHING RETURNING lane, epoch
"""
_BYE = "DELETE FROM {schema}.outbox_heartbeat WHERE relay_id = %(relay)s"


@dataclass
class Leases:
    """The lanes of one relay process.

    `held` maps each lane to its epoch; it is replaced, never changed, so that another thread can read it.
    """

    connection: psycopg.Connection[Any]
    schema: str = DEFAULT_SCHEMA
    time_to_live: timedelta = TIME_TO_LIVE
    relay_id: UUID = field(default_factory=uuid4)
    """Random for each start: a process that comes back is another relay, and its old lanes are free."""
    held: dict[int, int] = field(default_factory=dict)
    others_live: bool = False
    """Whether the last heartbeat met those of other relays."""
    _seq: int = 0
    _trusted_until: float = 0.0

    def trusted(self) -> bool:
        """Whether this relay can still take its lanes for its own."""
        return time.monotonic() < self._trusted_until

    def beat(self) -> None:
        """Say that this relay lives, and see to its share of the lanes. Call it every second or so.

        Changes `held`: lanes of dead relays are taken, lanes above the fair share are given back.
        """
        began = time.monotonic()
        self._seq += 1
        self._execute(
            _BEAT,
            relay=self.relay_id,
            seq=self._seq,
            ttl=self.time_to_live,
            host=socket.gethostname()[:200],
        )
        if not self.trusted():
            # It was paused for too long: what it held may be somebody else's by now.
            self.held = {}
        self._trusted_until = began + (self.time_to_live - _MARGIN).total_seconds()
        self._balance()
        if self._seq % 60 == 1:
            self._execute(_FORGET_BEATS)
            self._execute(_FORGET_LEASES)

    def release(self) -> None:
        """Give all lanes back, at a graceful end: the others have them at their next beat."""
        self._give_back(self.held.keys())
        self._execute(_BYE, relay=self.relay_id)
        self._trusted_until = 0.0

    def _balance(self) -> None:
        live = {row[0] for row in self._execute(_LIVE)} | {self.relay_id}
        self.others_live = len(live) > 1
        holders = {lane: (epoch, relay) for lane, epoch, relay in self._execute(_HOLDERS)}
        # Also what it held before a pause and nobody has taken: nobody would, now that it is seen to live.
        self.held = {
            lane: epoch for lane, (epoch, relay) in holders.items() if relay == self.relay_id
        }
        share = _fair_share(self.relay_id, live)
        free = [lane for lane in range(LANES) if holders.get(lane, (0, None))[1] not in live]
        surplus = len(self.held) - share
        if surplus > 0:
            self._give_back(sorted(self.held)[-surplus:])
        elif free and surplus < 0:
            # Each relay begins elsewhere, so that two who look at once seldom want the same lane.
            start = self.relay_id.int % len(free)
            self._claim([*free[start:], *free[:start]][:-surplus], holders)

    def _claim(self, lanes: list[int], holders: dict[int, tuple[int, UUID | None]]) -> None:
        epochs = [holders.get(lane, (0, None))[0] + 1 for lane in lanes]
        won = self._execute(_CLAIM, lanes=lanes, epochs=epochs, relays=[self.relay_id] * len(lanes))
        self.held = {**self.held, **dict(won)}

    def _give_back(self, lanes: Iterable[int]) -> None:
        given = list(lanes)
        epochs = [self.held[lane] + 1 for lane in given]
        self.held = {lane: epoch for lane, epoch in self.held.items() if lane not in given}
        self._execute(_CLAIM, lanes=given, epochs=epochs, relays=[None] * len(given))

    def _execute(self, template: str, **params: Any) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(in_schema(template, self.schema).encode(), params)
        return cursor.fetchall() if cursor.description else []


def _fair_share(relay: UUID, live: set[UUID]) -> int:
    """How many lanes *relay* should hold; the shares of all live relays add up to all lanes."""
    rank = sorted(live).index(relay)
    return LANES // len(live) + (1 if rank < LANES % len(live) else 0)
