"""Looks into the databases while the demo runs: how far is everyone?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

import psycopg

_SEEN: Final[dict[str, LiteralString]] = {
    "order": "SELECT count(*) FROM orders",
    "inventory": "SELECT count(*) FROM outbox.saga_step WHERE step = 'reserve_stock'",
    "users": "SELECT count(*) FROM outbox.saga_step WHERE step = 'add_points'",
    "shipping": "SELECT count(*) FROM outbox.saga_step WHERE step = 'create_shipment'",
    "analytics": "SELECT count(*) FROM outbox.inbox WHERE handler = 'analytics.count_created'",
}
_OPEN: Final = """
SELECT (SELECT count(*) FROM outbox.pending_delivery)
    + (SELECT count(*) FROM outbox.saga WHERE state IN ('running', 'compensating') AND NOT stuck)
"""


@dataclass(frozen=True)
class Glance:
    """The state of things at one moment."""

    confirmed: int
    cancelled: int
    undecided: int
    seen: Mapping[str, int]
    """How many orders each service has dealt with."""


class Watch:
    """One connection to each database."""

    def __init__(self, connections: Mapping[str, psycopg.Connection[Any]]) -> None:
        self._connections = connections

    def glance(self) -> Glance:
        orders = self._connections["order"]
        by_status = dict(
            orders.execute("SELECT status, count(*) FROM orders GROUP BY status").fetchall()
        )
        return Glance(
            confirmed=by_status.get("confirmed", 0),
            cancelled=by_status.get("cancelled", 0),
            undecided=by_status.get("created", 0),
            seen={name: self._value(name, select) for name, select in _SEEN.items()},
        )

    @property
    def is_quiet(self) -> bool:
        """Whether no service has any work under way that its own database knows of."""
        return not any(self._value(name, _OPEN) for name in self._connections)

    def now(self) -> datetime:
        """The databases' clock, which stamps everything that the audit compares."""
        moment: datetime = self._value("order", "SELECT clock_timestamp()")
        return moment

    def _value(self, service: str, select: LiteralString) -> Any:
        row = self._connections[service].execute(select).fetchone()
        assert row is not None
        return row[0]


@contextmanager
def watching(database_urls: Mapping[str, str]) -> Iterator[Watch]:
    with ExitStack() as closing:
        yield Watch(
            {
                name: closing.enter_context(psycopg.connect(url, autocommit=True))
                for name, url in database_urls.items()
            }
        )
