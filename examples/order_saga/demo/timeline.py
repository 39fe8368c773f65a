"""One order's way through the services, put together from their journals by the databases' clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from examples.order_saga.demo.books import Books, Order, Step

START = "start:order.created"
JOIN = "confirm_order"


@dataclass(frozen=True)
class Moment:
    """Something that happened to an order somewhere."""

    at: datetime
    service: str
    what: str
    sign: str
    """How it is meant: one of + (done), - (undone), ! (said no), = (decided), . (noted)."""


def timeline(books: Books, order: Order) -> list[Moment]:
    """Everything that happened to the order, in the order of time."""
    moments = [
        Moment(order.created_at, "order", "stored the order, published order.created", "+"),
        *_steps(books, order.id),
        *_counted(books, order.id),
    ]
    return sorted(moments, key=lambda moment: moment.at)


def unfulfilled_order(books: Books, killed_at: datetime) -> Order | None:
    """A cancelled order with much to undo, if there is one from before a service was killed."""
    cancelled = [order for order in books.orders.values() if order.status == "cancelled"]
    return min(
        cancelled,
        key=lambda order: (
            _last_change(books, order) > killed_at,
            -_undone(books, order),
            _last_change(books, order) - order.created_at,
        ),
        default=None,
    )


def order_of_the_outage(books: Books, killed_at: datetime, restarted_at: datetime) -> Order | None:
    """The first order that was accepted while a service was dead, and confirmed in the end."""
    meanwhile = [
        order
        for order in books.orders.values()
        if killed_at < order.created_at < restarted_at and order.status == "confirmed"
    ]
    return min(meanwhile, key=lambda order: order.created_at, default=None)


def _steps(books: Books, order_id: UUID) -> Iterator[Moment]:
    for service, step in _steps_of(books, order_id):
        if step.step == START:
            if step.state == "compensated":
                yield Moment(step.changed_at, service, "cancelled the order", "=")
        elif step.state == "rejected":
            reason = _reason(books, service, order_id)
            yield Moment(step.ran_at, service, f"{step.step} said no: {reason}", "!")
        elif step.state == "skipped":
            yield Moment(step.ran_at, service, f"{step.step} did not run: {step.reason}", ".")
        else:
            yield Moment(step.ran_at, service, step.step, "=" if step.step == JOIN else "+")
            if step.state == "compensated":
                yield Moment(step.changed_at, service, f"undid {step.step}", "-")


def _steps_of(books: Books, order_id: UUID) -> list[tuple[str, Step]]:
    return [
        (service, step)
        for service, ledger in books.ledgers.items()
        for step in ledger.steps
        if step.saga_id == order_id
    ]


def _reason(books: Books, service: str, order_id: UUID) -> str:
    """What the service said to everyone when it said no."""
    for event in books.ledgers[service].published:
        if event.key == str(order_id) and event.type.endswith(".rejected"):
            reason: str = json.loads(event.body)["data"]["reason"]
            return reason
    return "for no reason"


def _counted(books: Books, order_id: UUID) -> Iterator[Moment]:
    of_order = {
        event.event_id: event.type
        for ledger in books.ledgers.values()
        for event in ledger.published
        if event.key == str(order_id)
    }
    for row in books.ledgers["analytics"].received:
        if row.event_id in of_order:
            yield Moment(row.received_at, "analytics", f"counted {of_order[row.event_id]}", ".")


def _undone(books: Books, order: Order) -> int:
    steps = _steps_of(books, order.id)
    return sum(step.state == "compensated" and step.step != START for _, step in steps)


def _last_change(books: Books, order: Order) -> datetime:
    changes = [step.changed_at for _, step in _steps_of(books, order.id)]
    return max(changes, default=order.created_at)
