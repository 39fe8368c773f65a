"""What became of the events: all that were published against all that were received, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from examples.order_saga.analytics.service import analytics
from examples.order_saga.demo.books import Books, Ledger, Published
from examples.order_saga.inventory.service import inventory
from examples.order_saga.order.service import order
from examples.order_saga.shipping.service import shipping
from examples.order_saga.users.service import users
from outbox import Service
from saga.control import INTRODUCED

SUBSCRIBERS: Mapping[str, Service] = {
    service.name: service for service in (order, inventory, users, shipping, analytics)
}


@dataclass(frozen=True)
class Missing:
    """An event that a handler subscribes to and has not had."""

    event: Published
    service: str
    handler: str

    def __str__(self) -> str:
        return f"{self.event.type} {self.event.event_id} never reached {self.handler}"


@dataclass(frozen=True)
class Traffic:
    """Counted from the outbox and inbox tables, and from what the workers wrote down."""

    published: int
    """Events that were committed."""
    expected: int
    """Deliveries that these owe: one for each handler that subscribes to the type."""
    lost: list[Missing]
    """Of these, the ones that no inbox has."""
    phantom: list[str]
    """Deliveries of what nobody published, or not in these very bytes."""
    redelivered: int
    """Messages that came to a service more than once."""
    absorbed: int
    """Deliveries that an inbox had had before, and that had no effect."""


def examine(books: Books, subscribed_since: Mapping[str, datetime]) -> Traffic:
    """Compare all logs with all inboxes. *subscribed_since*: when a service came that came later."""
    published = {
        event.event_id: event for ledger in books.ledgers.values() for event in ledger.published
    }
    expected = [
        Missing(event, name, handler.name)
        for source, ledger in books.ledgers.items()
        for event in ledger.published
        # Introductions are said while queues are still being bound; who comes later is told again.
        if event.type != INTRODUCED.name
        for name, service in SUBSCRIBERS.items()
        if name not in subscribed_since or event.occurred_at >= subscribed_since[name]
        for handler in service.handlers_for(event.type, source)
    ]
    received = {
        (row.event_id, row.handler) for ledger in books.ledgers.values() for row in ledger.received
    }
    return Traffic(
        published=len(published),
        expected=len(expected),
        lost=[each for each in expected if (each.event.event_id, each.handler) not in received],
        phantom=list(_phantoms(books, published)),
        redelivered=sum(map(_redelivered, books.ledgers.values())),
        absorbed=sum(map(_absorbed, books.ledgers.values())),
    )


def _phantoms(books: Books, published: Mapping[UUID, Published]) -> Iterator[str]:
    for name, ledger in books.ledgers.items():
        # What a service owes itself, such as a compensation, goes through no log.
        own_work = {each.name for each in SUBSCRIBERS[name].handlers if not each.subscribes}
        for row in ledger.received:
            if row.handler in own_work:
                continue
            origin = published.get(row.event_id)
            if origin is None:
                yield f"{row.handler} received {row.event_id}, which nobody published"
            elif origin.digest != row.digest:
                yield f"{row.handler} received {origin.type} {row.event_id} with other content"


def _redelivered(ledger: Ledger) -> int:
    seen: set[UUID | None] = set()
    count = 0
    for delivery in ledger.deliveries:
        count += delivery.redelivered or delivery.event_id in seen
        seen.add(delivery.event_id)
    return count


def _absorbed(ledger: Ledger) -> int:
    return sum(
        outcome.endswith((" duplicate", " stale"))
        for delivery in ledger.deliveries
        for outcome in delivery.receipt.split(", ")
    )
