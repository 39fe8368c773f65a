"""The numbers of ordered events within their keys: without gaps, and in the order of commits.

The counter of a key is locked from the drawing of a number to the end of the transaction, so numbers and
then positions of a key are drawn in the order of commits; and the counting is undone with the transaction
or the savepoint, so there is no gap. How a counter is found at once however often it was moved:
`outbox.busy_keys`.

Counters are never deleted. A key that began again at 1 would meet subscribers that wait for its next
number, and take the new ones for old ones that come late, in any order.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from outbox.busy_keys import SPAN, BusyKeys
from outbox.connections import Execute
from outbox.errors import SchemaError
from outbox.sql import in_schema

# Waits for whoever has the row, and then goes on from what that one has left.
_COUNT: Final = """
INSERT INTO {schema}.outbox_key (source, type, key, seq) VALUES (%s, %s, %s, %s)
ON CONFLICT (source, type, key) DO UPDATE SET seq = outbox_key.seq + EXCLUDED.seq
WHERE outbox_key.seq IS NOT NULL RETURNING seq
"""
_COUNT_BUSY: Final = "SELECT {schema}.count_busy_key(%s, %s, %s, %s)"
_MOVE: Final = """
WITH moved AS (
    UPDATE {schema}.outbox_key SET seq = NULL WHERE source = %s AND type = %s AND key = %s
)
INSERT INTO {schema}.outbox_busy_key (source, type, key, span, seq) VALUES (%s, %s, %s, %s, %s)
"""

BUSY: Final = BusyKeys()


class Counted(NamedTuple):
    """Whose events are numbered."""

    source: str
    type: str
    key: str


def draw(execute: Execute, of: Counted, events: int, schema: str) -> int:
    """The last of as many numbers as there are *events*, which are the next ones of the key.

    One round trip; a second or third when a key gets busy, and where this process meets a busy key first.
    Raises `SchemaError` where the key's counter was deleted.
    """
    last = _count_busy(execute, of, events, schema) if (schema, of) in BUSY else None
    if last is None:
        last = _count(execute, of, events, schema)
    if last is None:
        # It had moved, so that is committed, and the next statement sees it.
        BUSY.add((schema, of))
        last = _count_busy(execute, of, events, schema)
    if last is None:
        raise SchemaError(
            f"the counter of key {of.key!r} ({of.type} of {of.source}) is to be in {schema}.outbox_busy_key, "
            "and is not: put back the row, with seq being the last number that was given"
        )
    return last


def _count(execute: Execute, of: Counted, events: int, schema: str) -> int | None:
    rows = execute(in_schema(_COUNT, schema), (*of, events), True)
    if not rows:
        return None
    last: int = rows[0][0]
    if last >= SPAN:
        execute(in_schema(_MOVE, schema), (*of, *of, last // SPAN, last), False)
        BUSY.add((schema, of))
    return last


def _count_busy(execute: Execute, of: Counted, events: int, schema: str) -> int | None:
    rows: list[tuple[Any, ...]] = execute(in_schema(_COUNT_BUSY, schema), (*of, events), True)
    last: int | None = rows[0][0]
    return last
