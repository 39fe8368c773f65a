"""Forgetting where handlers stand in ordered keys that have long been quiet.

Why no order is lost by it: what such a row keeps apart is earlier and later numbers of its key. Everything
up to the row's number is older than the row's last move, and so older than the dedupe window: it is
not run any more, but quarantined. What is run at any age (owed, a dead letter, quarantined) keeps the row.
So only later numbers can come, and those begin as for a handler that sees the key first in the middle
(`outbox.ordering`): in their order, after the wait of `SETTLE`. That wait is the price.

The publisher's counters are not forgotten: `outbox.counting` says why.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Final

from sqlalchemy import Engine

from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement

log = logging.getLogger(__name__)

IDLE: Final = timedelta(days=90)
"""How long a key is remembered after its last event was handled; twice the dedupe window if that is longer."""
_SHARE: Final = 10.0
_AT_ONCE: Final = 10_000

# One process at a time; nobody waits, as whoever holds it is doing the same work.
_TRY_TURN: Final = "SELECT pg_try_advisory_xact_lock(hashtext('{schema}.inbox idle keys'))"
# Before version 2 nobody noted when a row had moved on.
_IS_IDLE: Final = """
one.seen_at < now() - CAST(:age AS interval) AND one.passed = '{}' AND (
    SELECT applied_at FROM {schema}.schema_version WHERE component = 'outbox' AND version = 2
) < now() - CAST(:age AS interval)
AND NOT EXISTS (
    SELECT FROM {schema}.pending_delivery AS p
    WHERE p.handler = one.handler AND p.type = one.type AND p.key = one.key
) AND NOT EXISTS (
    SELECT FROM {schema}.dead_letter AS d
    WHERE d.handler = one.handler AND d.type = one.type AND d.key = one.key
) AND NOT EXISTS (SELECT FROM {schema}.quarantine WHERE key_seq IS NOT NULL)
"""
_FORGET: Final = f"""
DELETE FROM {{schema}}.inbox_order WHERE ctid = ANY (ARRAY(
    SELECT one.ctid FROM {{schema}}.inbox_order AS one TABLESAMPLE SYSTEM (CAST(:share AS real))
    WHERE one.next_seq > 0 AND {_IS_IDLE} LIMIT :limit FOR UPDATE OF one SKIP LOCKED
))
"""  # noqa: S608 - a constant, as below
# Both rows or neither, and nobody is waited for: workers take them in the other order.
_FORGET_BUSY: Final = f"""
WITH idle AS (
    SELECT one.handler, one.source, one.type, one.key FROM {{schema}}.inbox_busy_order AS one
    WHERE {_IS_IDLE} LIMIT :limit FOR UPDATE OF one SKIP LOCKED
), firsts AS (
    SELECT o.handler, o.source, o.type, o.key FROM {{schema}}.inbox_order AS o
    JOIN idle USING (handler, source, type, key) FOR UPDATE OF o SKIP LOCKED
), gone AS (
    DELETE FROM {{schema}}.inbox_busy_order AS b USING firsts AS f
    WHERE b.handler = f.handler AND b.source = f.source AND b.type = f.type AND b.key = f.key
    RETURNING b.handler, b.source, b.type, b.key
)
DELETE FROM {{schema}}.inbox_order AS o USING gone AS g
WHERE o.handler = g.handler AND o.source = g.source AND o.type = g.type AND o.key = g.key
"""  # noqa: S608


def forget(
    engine: Engine, *, window: timedelta, share: float = _SHARE, schema: str = DEFAULT_SCHEMA
) -> int:
    """Forget keys that were not used for `IDLE`, or twice the dedupe *window*; returns how many. Safe at any time.

    Looks at *share* percent of the table, chosen anew each time: what is found late does no harm, and a large
    table is not read every hour.
    """
    values = {"age": max(IDLE, 2 * window), "limit": _AT_ONCE}
    with engine.begin() as connection:
        if not connection.execute(statement(_TRY_TURN, schema)).scalar_one():
            return 0
        first = connection.execute(statement(_FORGET, schema), {**values, "share": share})
        busy = connection.execute(statement(_FORGET_BUSY, schema), values)
        forgotten = first.rowcount + busy.rowcount
    if forgotten:
        log.info("schema %s: forgot %d ordered keys that were idle for long", schema, forgotten)
    return forgotten
