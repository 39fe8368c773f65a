"""How things stand in one database: what waits to be published, what is owed, what needs a person.

Reads only, and little: what waits is counted up to a limit, so that asking costs the same with ten
million events behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import text

from outbox.sql import DEFAULT_SCHEMA, in_schema

if TYPE_CHECKING:
    from sqlalchemy import Connection

COUNTED_PER_LANE: Final = 100_000

# Per lane the newest cursor and the newest lease, then what the reader would read next: what is
# above `hi`, and the stragglers at or below it that the cursor's snapshot did not see.
_LANES: Final = """
SELECT lane.lane, cursor.hi, cursor.stored_at, holder.relay_id, holder.host, holder.alive,
       fresh.events + late.events AS waiting,
       clock_timestamp() - least(first_fresh.occurred_at, late.oldest) AS oldest
FROM generate_series(0, 15) AS lane (lane)
LEFT JOIN LATERAL (
    SELECT hi, snapshot, ceil, stored_at FROM {schema}.outbox_cursor
    WHERE lane = lane.lane ORDER BY epoch DESC, seq DESC LIMIT 1
) AS cursor ON true
LEFT JOIN LATERAL (
    SELECT relay_id FROM {schema}.outbox_lease
    WHERE lane = lane.lane ORDER BY epoch DESC LIMIT 1
) AS lease ON true
LEFT JOIN LATERAL (
    SELECT relay_id, host, expires_at > clock_timestamp() AS alive FROM {schema}.outbox_heartbeat
    WHERE relay_id = lease.relay_id ORDER BY seq DESC LIMIT 1
) AS holder ON true
CROSS JOIN LATERAL (
    SELECT count(*) AS events FROM (
        SELECT FROM {schema}.outbox_event
        WHERE lane = lane.lane AND position > coalesce(cursor.hi, -1) LIMIT :most
    ) AS counted
) AS fresh
LEFT JOIN LATERAL (
    SELECT occurred_at FROM {schema}.outbox_event
    WHERE lane = lane.lane AND position > coalesce(cursor.hi, -1) ORDER BY position LIMIT 1
) AS first_fresh ON true
CROSS JOIN LATERAL (
    SELECT count(*) AS events, min(occurred_at) AS oldest FROM {schema}.outbox_event
    WHERE lane = lane.lane AND position <= cursor.hi
      AND (xid = ANY (ARRAY(SELECT pg_snapshot_xip(cursor.snapshot)))
           OR xid >= pg_snapshot_xmax(cursor.snapshot) AND xid < cursor.ceil)
) AS late
ORDER BY lane.lane
"""
_PENDING: Final = """
SELECT service, reason, count(*) AS deliveries,
       count(*) FILTER (WHERE next_attempt_at < clock_timestamp()) AS due,
       clock_timestamp() - min(next_attempt_at) AS overdue
FROM {schema}.pending_delivery GROUP BY service, reason ORDER BY service, reason
"""
_DEAD: Final = """
SELECT service, handler, count(*) AS letters, clock_timestamp() - min(parked_at) AS oldest
FROM {schema}.dead_letter GROUP BY service, handler ORDER BY service, handler
"""
_QUARANTINED: Final = """
SELECT service, count(*) AS messages, clock_timestamp() - max(last_seen) AS newest
FROM {schema}.quarantine GROUP BY service ORDER BY service
"""

# An event that is awaited, but not long enough to be asked for, is no hole: it is on its way.
_MISSING: Final = """
SELECT service, type, count(*) FILTER (WHERE gone_at IS NULL) AS holes,
       count(*) FILTER (WHERE gone_at IS NOT NULL) AS gone,
       clock_timestamp() - min(noticed_at) AS oldest,
       (array_agg(event_id ORDER BY noticed_at))[1] AS first
FROM {schema}.awaited WHERE asks > 0 GROUP BY service, type ORDER BY service, type
"""


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane of the log: what waits in it, and who carries it."""

    lane: int
    waiting: int
    """Committed events not yet known to be with the broker; counting stops at 100,000."""
    oldest: timedelta | None
    """How long the oldest of them has waited."""
    cursor: int | None
    """Highest position delivered; None before the first."""
    cursor_stored_at: datetime | None
    relay_id: UUID | None
    """The relay that holds the lane; None where nobody does."""
    host: str | None
    relay_alive: bool


@dataclass(frozen=True, slots=True)
class Owed:
    """Deliveries that one service will try again."""

    service: str
    reason: str
    deliveries: int
    due: int
    overdue: timedelta
    """Since when the first one is due; negative while none is."""


@dataclass(frozen=True, slots=True)
class Dead:
    """Deliveries that one handler failed for good."""

    service: str
    handler: str
    letters: int
    oldest: timedelta


@dataclass(frozen=True, slots=True)
class Unread:
    """Messages that one service could not read."""

    service: str
    messages: int
    newest: timedelta


@dataclass(frozen=True, slots=True)
class Missing:
    """Events of one type that their source sent and that one service was not given."""

    service: str
    type: str
    holes: int
    """They are asked for."""
    gone: int
    """The source has dropped them from its log."""
    oldest: timedelta
    first: UUID
    """The id of one that has been missed for longest."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How things stand in one schema."""

    lanes: Sequence[Lane]
    pending: Sequence[Owed]
    dead: Sequence[Dead]
    quarantined: Sequence[Unread]
    missing: Sequence[Missing] = ()

    @property
    def waiting(self) -> int:
        """Events that wait to be published."""
        return sum(lane.waiting for lane in self.lanes)

    @property
    def oldest(self) -> timedelta | None:
        """How long the oldest of them has waited."""
        return max((lane.oldest for lane in self.lanes if lane.oldest is not None), default=None)

    @property
    def relays(self) -> frozenset[UUID]:
        """The relays that hold a lane and are alive."""
        return frozenset(
            lane.relay_id for lane in self.lanes if lane.relay_id is not None and lane.relay_alive
        )

    def problems(self, patience: timedelta) -> Iterator[str]:
        """What is wrong, in words; nothing where an event may wait for *patience* and none does."""
        uncarried = sum(lane.waiting for lane in self.lanes if not lane.relay_alive)
        if uncarried:
            yield (
                f"{plural(uncarried, 'event')} in lanes that no relay holds: start `outbox relay`"
            )
        elif self.oldest is not None and self.oldest > patience:
            yield (
                f"the oldest of {plural(self.waiting, 'unpublished event')} has waited for "
                f"{self.oldest.total_seconds():.0f} s: is the broker reachable? See `outbox doctor`"
            )
        overdue = sum(owed.due for owed in self.pending if owed.overdue > patience)
        if overdue:
            yield (
                f"{plural(overdue, 'delivery', 'deliveries')} overdue: "
                "is a worker of their service running?"
            )
        if self.dead:
            letters = sum(each.letters for each in self.dead)
            yield f"{plural(letters, 'dead letter')}: see `outbox dead list`"
        if self.quarantined:
            messages = sum(each.messages for each in self.quarantined)
            yield f"{plural(messages, 'message')} in quarantine: see `outbox quarantine list`"
        holes = sum(each.holes for each in self.missing if each.oldest > patience)
        if holes:
            yield (
                f"{plural(holes, 'event')} never came, though asked for: does a worker of the source run, and its "
                "relay? `outbox audit --repair` has them sent again"
            )
        gone = sum(each.gone for each in self.missing)
        if gone:
            yield (
                f"{plural(gone, 'event')} never came and the source has dropped them from its log: bring the data over "
                "by hand, then `outbox holes forget`"
            )


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 event`, `2,000 events`."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def read_standing(connection: Connection, schema: str = DEFAULT_SCHEMA) -> Standing:
    """Read how things stand in *schema*, from several statements and so not at one instant."""

    def rows(sql: str, **values: Any) -> list[Any]:
        return list(connection.execute(text(in_schema(sql, schema)), values))

    return Standing(
        lanes=[
            Lane(
                lane=row.lane,
                waiting=row.waiting,
                oldest=row.oldest,
                cursor=row.hi,
                cursor_stored_at=row.stored_at,
                relay_id=row.relay_id,
                host=row.host,
                relay_alive=bool(row.alive),
            )
            for row in rows(_LANES, most=COUNTED_PER_LANE)
        ],
        pending=[Owed(*row) for row in rows(_PENDING)],
        dead=[Dead(*row) for row in rows(_DEAD)],
        quarantined=[Unread(*row) for row in rows(_QUARANTINED)],
        missing=[Missing(*row) for row in rows(_MISSING)],
    )
