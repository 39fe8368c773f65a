"""Snapshots and transaction ids mean nothing in another cluster: noticing a restore, and adopting one.

After a logical restore (pg_dump) the rows carry xids of the old cluster. A relay that went on would skip events, or
send old ones for ever. So the log remembers its cluster's system identifier; a relay that finds another one stops and
says what to do, and `adopt` does it.
"""

from __future__ import annotations

from typing import Any, Final

import psycopg

from outbox.errors import ConfigurationError
from outbox.sql import DEFAULT_SCHEMA, in_schema

_HERE: Final = "SELECT system_identifier FROM pg_control_system()"
_KNOWN: Final = (
    "SELECT system_identifier FROM {schema}.outbox_cluster ORDER BY adopted_at DESC LIMIT 1"
)
_REMEMBER: Final = (
    "INSERT INTO {schema}.outbox_cluster (system_identifier) VALUES (%s) ON CONFLICT DO NOTHING"
)
_NEWEST_CURSORS: Final = """
SELECT DISTINCT ON (lane) lane, epoch, seq, hi, snapshot, ceil FROM {schema}.outbox_cursor
ORDER BY lane, epoch DESC, seq DESC
"""
# What the old cursor had not seen, though it lies below it: written again, above it.
_COPY_STRAGGLERS: Final = f"""
WITH newest AS ({_NEWEST_CURSORS})
INSERT INTO {{schema}}.outbox_event (lane, event_id, type, version, key, key_seq, occurred_at, body)
SELECT e.lane, e.event_id, e.type, e.version, e.key, e.key_seq, e.occurred_at, e.body
FROM {{schema}}.outbox_event AS e JOIN newest AS c USING (lane)
WHERE e.position <= c.hi AND NOT pg_visible_in_snapshot(e.xid, c.snapshot)
ORDER BY e.position
"""  # noqa: S608 - constants
_FORGET_XIDS: Final = """
UPDATE {schema}.outbox_event SET xid = '3'::xid8 WHERE xid <> pg_current_xact_id()
"""
_RESTART_CURSORS: Final = f"""
INSERT INTO {{schema}}.outbox_cursor (slot, lane, epoch, seq, hi, snapshot)
SELECT 0, lane, epoch, seq + 1, hi, pg_current_snapshot() FROM ({_NEWEST_CURSORS}) AS newest
"""  # noqa: S608
# The snapshots of rolls mean as little. What older ones named is asked for from the beginning of the log.
_RESTART_ROLLS: Final = """
WITH newest AS (
    SELECT DISTINCT ON (lane) lane, seq, hi, types FROM {schema}.outbox_roll ORDER BY lane, seq DESC
), forgotten AS (
    DELETE FROM {schema}.outbox_roll
)
INSERT INTO {schema}.outbox_roll (lane, seq, hi, snapshot, types)
SELECT lane, seq + 1, hi, pg_current_snapshot(), types FROM newest
"""


def check_cluster(connection: psycopg.Connection[Any], schema: str = DEFAULT_SCHEMA) -> None:
    """Remember the cluster at the first start; raise `ConfigurationError` when the log has moved to another one."""
    here = connection.execute(_HERE).fetchone()
    known = connection.execute(in_schema(_KNOWN, schema).encode()).fetchone()
    if known is None:
        connection.execute(in_schema(_REMEMBER, schema).encode(), here)
    elif known != here:
        raise ConfigurationError(
            f"schema {schema!r} was restored into another PostgreSQL cluster, where the positions of its readers mean "
            "nothing. Stop every relay and every writer, then run `outbox adopt-cluster` once: no event is lost, some "
            "may be sent again"
        )


def adopt(connection: psycopg.Connection[Any], schema: str = DEFAULT_SCHEMA) -> None:
    """Make a restored log this cluster's own. Nothing else may read or write it meanwhile.

    Events below a cursor that it had not delivered are written again above it; all others are what they were.
    """
    with connection.transaction():
        connection.execute(
            in_schema("LOCK TABLE {schema}.outbox_event IN EXCLUSIVE MODE", schema).encode()
        )
        for statement in (_COPY_STRAGGLERS, _FORGET_XIDS, _RESTART_CURSORS, _RESTART_ROLLS):
            connection.execute(in_schema(statement, schema).encode())
        here = connection.execute(_HERE).fetchone()
        connection.execute(in_schema("DELETE FROM {schema}.outbox_cluster", schema).encode())
        connection.execute(in_schema(_REMEMBER, schema).encode(), here)
