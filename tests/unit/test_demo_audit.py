"""The demo's audit: it is silent over books that are right, and names whatever is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from examples.order_saga.demo.audit import Evidence, audit
from examples.order_saga.demo.books import (
    Books,
    Delivery,
    Entry,
    Ledger,
    Line,
    Order,
    Published,
    Received,
    Saga,
    Shipment,
    Step,
)
from examples.order_saga.demo.load import Accepted
from examples.order_saga.demo.shop import Kind, PlannedOrder, Shop
from examples.order_saga.demo.summary import percentile
from examples.order_saga.demo.traffic import SUBSCRIBERS, examine

START = datetime(2026, 1, 1, tzinfo=UTC)
CONFIRMED, CANCELLED = UUID(int=1), UUID(int=2)
STATES = {CONFIRMED: "completed", CANCELLED: "compensated"}

Tampering = Callable[[Books], None]


@pytest.fixture
def books() -> Books:
    """One order that was confirmed and one that was cancelled, all as it should be."""
    created = [
        Published(uuid4(), "order.created", str(id), START, json.dumps({"id": str(id)}).encode())
        for id in STATES
    ]
    ledgers = {name: ledger(name, created) for name in SUBSCRIBERS}
    ledgers["order"].published.extend(created)
    return Books(
        orders={
            CONFIRMED: Order(CONFIRMED, "alice", "DE", 4900, "confirmed", None, "T1", START, START),
            CANCELLED: Order(CANCELLED, "bob", "AQ", 100, "cancelled", "no", None, START, START),
        },
        ordered=[Line(CONFIRMED, "lamp", 1), Line(CANCELLED, "lamp", 2)],
        stock={"lamp": 9},
        reserved=[Line(CONFIRMED, "lamp", 1)],
        pending=[],
        points={"alice": 49, "bob": 0},
        entries=[Entry(CONFIRMED, "alice", 49)],
        shipments={
            CONFIRMED: Shipment(CONFIRMED, "T1", "DE", "active"),
            CANCELLED: Shipment(CANCELLED, "T2", "AQ", "cancelled"),
        },
        counters={"orders created": 2},
        ledgers=ledgers,
    )


def ledger(service: str, created: list[Published]) -> Ledger:
    received = [
        Received(event.event_id, handler.name, event.digest, START)
        for event in created
        for handler in SUBSCRIBERS[service].handlers_for(event.type)
    ]
    if service == "analytics":
        return Ledger(received=received)
    return Ledger(
        received=received,
        sagas={id: Saga(id, state, False, None) for id, state in STATES.items()},
        steps=[Step(id, f"step of {service}", "done", None, START, START) for id in STATES],
    )


def violations(books: Books, *, since: dict[str, datetime] | None = None) -> list[str]:
    planned = {
        CONFIRMED: PlannedOrder(Kind.FINE, "alice", "DE", {"lamp": 1}),
        CANCELLED: PlannedOrder(Kind.UNSERVED, "bob", "AQ", {"lamp": 2}),
    }
    evidence = Evidence(
        books=books,
        shop=Shop(orders=tuple(planned.values()), stock={"lamp": 10}),
        accepted=[Accepted(id, order, 1.0) for id, order in planned.items()],
        refused=[],
        traffic=examine(books, since or {}),
    )
    return [violation for finding in audit(evidence) for violation in finding.violations]


def test_books_that_are_right_have_no_violation(books: Books) -> None:
    assert violations(books) == []


def alter_order(id: UUID, **changes: object) -> Tampering:
    def tamper(books: Books) -> None:
        books.orders[id] = replace(books.orders[id], **changes)  # type: ignore[arg-type]

    return tamper


def alter_ledger(service: str, **changes: object) -> Tampering:
    def tamper(books: Books) -> None:
        books.ledgers[service] = replace(books.ledgers[service], **changes)  # type: ignore[arg-type]

    return tamper


def alter_received(books: Books) -> None:
    received = books.ledgers["users"].received
    received[0] = replace(received[0], digest=b"of something else")


def run_a_step_again(books: Books) -> None:
    books.ledgers["shipping"].steps.append(books.ledgers["shipping"].steps[0])


TAMPERED: dict[str, tuple[Tampering, str]] = {
    "an order that never ended": (
        alter_order(CANCELLED, status="created", settled_at=None),
        "is still created",
    ),
    "an order that is gone": (lambda b: b.orders.pop(CONFIRMED) and None, "is not in the database"),
    "an order nobody placed": (
        lambda b: b.orders.update({UUID(int=3): replace(b.orders[CONFIRMED], id=UUID(int=3))}),
        "was not accepted",
    ),
    "an order that should not have been confirmed": (
        alter_order(CANCELLED, status="confirmed"),
        "(unserved) is confirmed",
    ),
    "an order that was cancelled for no reason": (
        alter_order(CANCELLED, reason=None),
        "without a reason",
    ),
    "an item that is not shown as sold": (
        lambda b: b.pending.append(b.reserved[0]),
        "1 of lamp are shown as reserved by order",
    ),
    "stock that is gone": (lambda b: b.stock.update(lamp=8), "lamp: 10 − 1 sold, but 8 are left"),
    "a reservation that stayed": (
        lambda b: b.reserved.append(Line(CANCELLED, "lamp", 2)),
        "reservation too many",
    ),
    "points added twice": (lambda b: b.points.update(alice=98), "alice has 98 points"),
    "points that were not taken back": (
        lambda b: b.entries.append(Entry(CANCELLED, "bob", 1)),
        "entry of points too many",
    ),
    "a parcel for a cancelled order": (
        lambda b: b.shipments.update({CANCELLED: Shipment(CANCELLED, "T2", "AQ", "active")}),
        "active shipment too many",
    ),
    "a parcel that is missing": (
        lambda b: b.shipments.pop(CONFIRMED) and None,
        "active shipment missing",
    ),
    "an effect that came twice": (
        lambda b: b.counters.update({"orders created": 3}),
        "handled 2 events and counted 3",
    ),
    "a step that ran twice": (run_a_step_again, "ran 2 times"),
    "a service that knows another end": (
        lambda b: b.ledgers["users"].sagas.update(
            {CONFIRMED: Saga(CONFIRMED, "compensating", False, None)}
        ),
        "its saga compensating in users",
    ),
    "a service that never heard of it": (
        lambda b: b.ledgers["shipping"].sagas.pop(CONFIRMED) and None,
        "its saga unknown in shipping",
    ),
    "a saga that is stuck": (
        lambda b: b.ledgers["users"].sagas.update(
            {CONFIRMED: Saga(CONFIRMED, "completed", True, None)}
        ),
        "users: sagas stuck: 1",
    ),
    "a delivery that is owed": (alter_ledger("order", owed=1), "order: deliveries still owed: 1"),
    "a dead letter": (alter_ledger("order", dead=2), "order: dead letters: 2"),
    "a message in quarantine": (
        alter_ledger("analytics", quarantined=1),
        "analytics: quarantined messages: 1",
    ),
    "an event that never arrived": (
        lambda b: b.ledgers["inventory"].received.clear(),
        "never reached inventory.reserve_stock",
    ),
    "an event that nobody published": (
        lambda b: b.ledgers["order"].received.append(
            Received(uuid4(), "order.saga.aborted", b"", START)
        ),
        "which nobody published",
    ),
    "an event that arrived with other content": (alter_received, "with other content"),
}


@pytest.mark.parametrize("wrong", TAMPERED)
def test_the_audit_names(books: Books, wrong: str) -> None:
    tamper, expected = TAMPERED[wrong]
    tamper(books)
    assert expected in "\n".join(violations(books))


def test_a_latecomer_is_owed_nothing_from_before_it_came(books: Books) -> None:
    books.ledgers["analytics"].received.clear()
    books.counters.clear()
    assert len(violations(books)) == 2
    assert violations(books, since={"analytics": START + timedelta(seconds=1)}) == []
    assert len(violations(books, since={"analytics": START})) == 2


def test_repeated_messages_and_absorbed_deliveries_are_counted(books: Books) -> None:
    first, second = uuid4(), uuid4()
    books.ledgers["users"].deliveries.extend(
        [
            Delivery(first, False, "users.add_points handled"),
            Delivery(first, False, "users.add_points duplicate"),
            Delivery(second, True, "users.add_points handled"),
        ]
    )
    traffic = examine(books, {})
    assert (traffic.redelivered, traffic.absorbed) == (2, 1)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile(range(1, 101), 50) == 50
    assert percentile(range(1, 101), 99) == 99
    assert percentile([7.25], 99) == 7.2
    assert percentile([], 50) == 0.0
