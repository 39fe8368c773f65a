"""Replay: events of the retained log, sent once more to one subscriber, whose inbox decides what is new to it.

For a subscriber that begins with the past (backfill), or that wants some of it again after a repair of its own. Read
page by page in the order of positions, each page sent only when the broker has confirmed the one before it; so memory
is bounded and the broker sets the pace. It ends at the last event that was there when it began: what comes after that
is the relay's.

Events are taken as they lie in the log, delivered or not; one that the relay has not sent yet comes twice. So a page is
made durable first, as the relay does it. A standby has only what is on its primary's disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg

from outbox.buses.base import Bus, OutgoingMessage
from outbox.reader import MESSAGE, make_durable
from outbox.sql import DEFAULT_SCHEMA, in_schema

_PAGE_ROWS: Final = 500
_WIDEST: Final = 1_000_000
"""Positions looked through at a time where few events are of the types wanted."""

_LAST: Final = "SELECT last_value, pg_is_in_recovery() FROM {schema}.outbox_event_position"
# Sixteen ranges of the primary key. Its window of positions bounds what has to be sorted.
_PAGE: Final = f"""
SELECT {MESSAGE} FROM {{schema}}.outbox_event AS e
WHERE lane = ANY(ARRAY[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]::smallint[])
    AND position > %(after)s AND position <= %(last)s AND type = ANY(%(types)s::text[])
    AND (%(since)s::timestamptz IS NULL OR occurred_at >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR occurred_at < %(until)s)
ORDER BY position LIMIT %(rows)s
"""  # noqa: S608 - constants
_COUNT: Final = """
SELECT type, count(*) FROM {schema}.outbox_event
WHERE position > %(after)s AND position <= %(last)s AND type = ANY(%(types)s::text[])
    AND (%(since)s::timestamptz IS NULL OR occurred_at >= %(since)s)
    AND (%(until)s::timestamptz IS NULL OR occurred_at < %(until)s)
GROUP BY type
"""


@dataclass(frozen=True)
class Selection:
    """Which events of a log."""

    types: Sequence[str]
    since: datetime | None = None
    """Written at or after this; None: from the beginning of what is retained."""
    until: datetime | None = None
    """Written before this; None: up to now."""
    after: int = 0
    """Behind this position only: to go on where a replay was broken off."""


@dataclass(frozen=True)
class Progress:
    """How far a replay has come, every page confirmed by the broker."""

    sent: int
    position: int
    """Everything that was selected up to here has been sent."""


class Replay:
    """Of one log, through a connection in autocommit."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        selection: Selection,
        *,
        schema: str = DEFAULT_SCHEMA,
        page_rows: int = _PAGE_ROWS,
    ) -> None:
        self._connection = connection
        self._selection = selection
        self._schema = schema
        self._rows = page_rows
        self._last, self._is_of_standby = self._execute(_LAST)[0]

    def count(self) -> dict[str, int]:
        """How many events by type there are to send. Reads the whole log once."""
        return dict(self._execute(_COUNT, **self._params(self._selection.after, self._last)))

    def send(self, bus: Bus, queue: str) -> Iterator[Progress]:
        """Send them to *queue*, telling after each confirmed page. Raises `BusError`: go on from the last position."""
        sent, position, width = 0, self._selection.after, self._rows
        while position < self._last:
            end = min(position + width, self._last)
            page = self._page(position, end, queue)
            if len(page) == self._rows:
                end, width = page[-1].position, max(width // 2, self._rows)
            elif len(page) < self._rows // 2:
                width = min(width * 2, _WIDEST)
            if page:
                if not self._is_of_standby:
                    make_durable(self._connection)
                bus.send(page).wait()
            sent, position = sent + len(page), end
            yield Progress(sent, position)

    def _page(self, after: int, last: int, queue: str) -> list[OutgoingMessage]:
        """Addressed to one queue: the inbox there decides whether they are new."""
        rows = self._execute(_PAGE, **self._params(after, last), rows=self._rows)
        return [OutgoingMessage._make((*row, queue, None)) for row in rows]

    def _params(self, after: int, last: int) -> dict[str, Any]:
        selection = self._selection
        return {
            "types": list(selection.types),
            "since": selection.since,
            "until": selection.until,
            "after": after,
            "last": last,
        }

    def _execute(self, template: str, **params: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(
            in_schema(template, self._schema).encode(), params or None
        ).fetchall()
