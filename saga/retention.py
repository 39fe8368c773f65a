"""Forgetting sagas that ended long ago, with their steps, arrivals, interventions, and tombstones.

What is forgotten must not be able to begin again: a trigger of a forgotten saga would find no
tombstone and run its step. So

- a saga is remembered for longer than the dedupe window after the last change to any part of it: a
  trigger that comes later than that is quarantined, not run;
- what is run at any age (what is owed, and what a person may still redrive from the dead letters or
  the quarantine) keeps its saga remembered for as long as it is there;
- an open saga, a stuck one, and one with a run that is not at its end, are never forgotten.

The rows are found and locked (skipping those that somebody works on) and deleted in small
transactions. A delivery that waits for such a row finds it gone and inserts it anew (`lock`), which
is what it would have done a moment later.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Final

from sqlalchemy import Engine

from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement

log = logging.getLogger(__name__)

DEFAULT: Final = timedelta(days=90)
_ONE_DAY: Final = timedelta(days=1)
_AT_ONCE: Final = 1_000

_HAS_ANY: Final = """
SELECT EXISTS (
    SELECT 1 FROM {schema}.saga WHERE state IN ('completed', 'compensated')
        AND participant = :participant AND changed_at < clock_timestamp() - :age
)
"""
# Escaped, a body is text whatever is in it.
_SAGA_ID: Final = """substring(encode(body, 'escape') FROM '"sagaid" *[:] *"([0-9a-fA-F-]{36})"')"""
_FORGET: Final = f"""
WITH wanted AS MATERIALIZED (
    SELECT {_SAGA_ID} AS saga_id FROM {{schema}}.dead_letter
    UNION ALL SELECT {_SAGA_ID} FROM {{schema}}.pending_delivery
    UNION ALL SELECT {_SAGA_ID} FROM {{schema}}.quarantine
), ended AS MATERIALIZED (
    SELECT saga_id FROM {{schema}}.saga AS saga
    WHERE state IN ('completed', 'compensated') AND participant = :participant
        AND changed_at < clock_timestamp() - :age AND NOT stuck
        AND NOT EXISTS (
            SELECT 1 FROM {{schema}}.saga_step AS step
            WHERE step.saga_id = saga.saga_id AND step.participant = saga.participant
                AND (step.changed_at >= clock_timestamp() - :age OR step.state NOT IN
                    ('done', 'rejected', 'skipped', 'compensated', 'not_happened'))
        )
        AND CAST(saga_id AS text) NOT IN
            (SELECT lower(saga_id) FROM wanted WHERE saga_id IS NOT NULL)
    ORDER BY changed_at LIMIT :limit FOR UPDATE SKIP LOCKED
)
DELETE FROM {{schema}}.saga
WHERE participant = :participant AND saga_id IN (SELECT saga_id FROM ended)
"""  # noqa: S608 - constant text


def no_shorter_than(window: timedelta, retention: timedelta) -> timedelta:
    """*retention*, or a day more than the dedupe *window* where that is longer."""
    return max(retention, window + _ONE_DAY)


def forget_ended(
    engine: Engine,
    participant: str,
    after: timedelta,
    *,
    at_once: int = _AT_ONCE,
    schema: str = DEFAULT_SCHEMA,
) -> int:
    """Forget the sagas of *participant* that ended longer than *after* ago; returns how many."""
    forgotten = 0
    while True:
        deleted = _forget_some(engine, participant, after, at_once, schema)
        forgotten += deleted
        if deleted < at_once:
            break
    if forgotten:
        log.info("%s forgot %d sagas that ended more than %s ago", participant, forgotten, after)
    return forgotten


def _forget_some(
    engine: Engine, participant: str, after: timedelta, limit: int, schema: str
) -> int:
    values = {"participant": participant, "age": after, "limit": limit}
    with engine.begin() as connection:
        if not connection.execute(statement(_HAS_ANY, schema), values).scalar():
            return 0
        return max(0, connection.execute(statement(_FORGET, schema), values).rowcount)
