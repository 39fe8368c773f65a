"""Everything that the five databases hold once the demo is over, read row by row and not yet judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, LiteralString, TypeVar
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import class_row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PENDING: Final = """
SELECT {} FROM reservation WHERE pending_saga IN (
    SELECT saga_id FROM outbox.saga
    WHERE participant = 'inventory' AND state IN ('running', 'compensating')
)
"""

Row = TypeVar("Row", bound="DataclassInstance")


@dataclass(frozen=True)
class Order:
    id: UUID
    customer_id: str
    country: str
    total_cents: int
    status: str
    reason: str | None
    tracking_number: str | None
    created_at: datetime
    settled_at: datetime | None


@dataclass(frozen=True)
class Line:
    """So many of a product, belonging to an order: ordered, or taken out of the stock."""

    order_id: UUID
    sku: str
    quantity: int


@dataclass(frozen=True)
class Entry:
    """Points that an order brought."""

    order_id: UUID
    user_id: str
    points: int


@dataclass(frozen=True)
class Shipment:
    order_id: UUID
    tracking_number: str
    country: str
    status: str


@dataclass(frozen=True)
class Published:
    """An event in the log of the service that published it."""

    event_id: UUID
    type: str
    key: str | None
    occurred_at: datetime
    body: bytes

    @property
    def digest(self) -> bytes:
        return sha256(self.body).digest()

    @property
    def source(self) -> str:
        source: str = json.loads(self.body)["source"]
        return source


@dataclass(frozen=True)
class Received:
    """An event in the inbox of a service, once for each of its handlers."""

    event_id: UUID
    handler: str
    digest: bytes
    received_at: datetime


@dataclass(frozen=True)
class Delivery:
    """A message that a worker has finished with, as the worker itself wrote it down."""

    event_id: UUID | None
    redelivered: bool
    receipt: str


@dataclass(frozen=True)
class Saga:
    saga_id: UUID
    state: str
    stuck: bool
    reason: str | None


@dataclass(frozen=True)
class Step:
    saga_id: UUID
    step: str
    state: str
    reason: str | None
    ran_at: datetime
    changed_at: datetime


@dataclass(frozen=True)
class Ledger:
    """What `outbox` and `saga` have written down in one service's database."""

    published: list[Published] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    sagas: dict[UUID, Saga] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    owed: int = 0
    dead: int = 0
    quarantined: int = 0


@dataclass(frozen=True)
class Books:
    """The business rows of each service, and the ledgers of all of them by service."""

    orders: dict[UUID, Order]
    ordered: list[Line]
    stock: dict[str, int]
    reserved: list[Line]
    pending: list[Line]
    """What inventory shows as reserved by an order that is not decided."""
    points: dict[str, int]
    entries: list[Entry]
    shipments: dict[UUID, Shipment]
    counters: dict[str, int]
    ledgers: dict[str, Ledger]


def read_books(database_urls: Mapping[str, str]) -> Books:
    """Read all five databases, each in one transaction of its own."""
    ledgers: dict[str, Ledger] = {}
    readers: dict[str, _Reader] = {}
    connections = {name: psycopg.connect(url) for name, url in database_urls.items()}
    try:
        for name, connection in connections.items():
            readers[name] = _Reader(connection)
            ledgers[name] = _ledger(readers[name])
        return Books(
            orders=_by_id(readers["order"].rows(Order, "SELECT {} FROM orders")),
            ordered=readers["order"].rows(Line, "SELECT {} FROM order_item"),
            stock=readers["inventory"].pairs("SELECT sku, available FROM stock"),
            reserved=readers["inventory"].rows(Line, "SELECT {} FROM reservation"),
            pending=readers["inventory"].rows(Line, _PENDING),
            points=readers["users"].pairs("SELECT id, points FROM users"),
            entries=readers["users"].rows(Entry, "SELECT {} FROM points_entry"),
            shipments={
                each.order_id: each
                for each in readers["shipping"].rows(Shipment, "SELECT {} FROM shipment")
            },
            counters=readers["analytics"].pairs("SELECT name, value FROM counter"),
            ledgers=ledgers,
        )
    finally:
        for connection in connections.values():
            connection.close()


def _ledger(reader: _Reader) -> Ledger:
    sagas = reader.rows(Saga, "SELECT {} FROM outbox.saga")
    return Ledger(
        published=reader.rows(Published, "SELECT {} FROM outbox.outbox_event ORDER BY occurred_at"),
        received=reader.rows(Received, "SELECT {} FROM outbox.inbox ORDER BY received_at"),
        deliveries=reader.rows(Delivery, "SELECT {} FROM demo_delivery ORDER BY finished_at"),
        sagas={saga.saga_id: saga for saga in sagas},
        steps=reader.rows(Step, "SELECT {} FROM outbox.saga_step ORDER BY ordinal"),
        owed=reader.count("SELECT count(*) FROM outbox.pending_delivery"),
        dead=reader.count("SELECT count(*) FROM outbox.dead_letter"),
        quarantined=reader.count("SELECT count(*) FROM outbox.quarantine"),
    )


@dataclass
class _Reader:
    connection: psycopg.Connection[Any]

    def rows(self, kind: type[Row], select: LiteralString) -> list[Row]:
        """The rows as objects of *kind*, whose fields are the columns that take the place of {}."""
        columns = sql.SQL(", ").join([sql.Identifier(column.name) for column in fields(kind)])
        with self.connection.cursor(row_factory=class_row(kind)) as cursor:
            return cursor.execute(sql.SQL(select).format(columns)).fetchall()

    def pairs(self, select: LiteralString) -> dict[str, int]:
        return dict(self.connection.execute(select).fetchall())

    def count(self, select: LiteralString) -> int:
        row = self.connection.execute(select).fetchone()
        assert row is not None
        return int(row[0])


def _by_id(orders: list[Order]) -> dict[UUID, Order]:
    return {order.id: order for order in orders}
