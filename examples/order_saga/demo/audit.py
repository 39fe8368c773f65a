"""The audit: what must hold in the books, whatever was killed on the way. It trusts no service's word for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from uuid import UUID

from examples.order_saga.demo.books import Books, Order
from examples.order_saga.demo.load import Accepted
from examples.order_saga.demo.shop import RARE_IN_STOCK, Kind, Shop
from examples.order_saga.demo.traffic import Traffic

CENTS_PER_POINT = 100

Rows = Set[tuple[object, ...]]


@dataclass(frozen=True)
class Finding:
    """One thing that must hold, what was counted, and where it does not hold."""

    promise: str
    counted: str
    violations: Sequence[str]

    @property
    def holds(self) -> bool:
        return not self.violations


@dataclass(frozen=True)
class Evidence:
    """What the audit looks at."""

    books: Books
    shop: Shop
    accepted: Sequence[Accepted]
    refused: Sequence[str]
    """Answers of the shop to orders that it should have accepted."""
    traffic: Traffic

    @property
    def confirmed(self) -> dict[UUID, Order]:
        return self._with_status("confirmed")

    @property
    def cancelled(self) -> dict[UUID, Order]:
        return self._with_status("cancelled")

    def _with_status(self, status: str) -> dict[UUID, Order]:
        return {each.id: each for each in self.books.orders.values() if each.status == status}


def audit(evidence: Evidence) -> list[Finding]:
    return [check(evidence) for check in CHECKS]


def every_order_ended(evidence: Evidence) -> Finding:
    orders = evidence.books.orders
    promised = {each.order_id for each in evidence.accepted}
    return Finding(
        "Every accepted order is confirmed or cancelled",
        f"{len(promised)} accepted, {len(orders)} in the database",
        [
            *(f"an order was not accepted: {answer}" for answer in evidence.refused),
            *(f"order {id} was accepted and is not in the database" for id in promised - orders.keys()),
            *(f"order {id} is in the database and was not accepted" for id in orders.keys() - promised),
            *(f"order {each.id} is still {each.status}" for each in orders.values() if not each.settled_at),
        ],
    )  # fmt: skip


def every_order_ended_rightly(evidence: Evidence) -> Finding:
    return Finding(
        "Cancelled are exactly those that had to be",
        f"{_must_be_cancelled(evidence)} had to be, {len(evidence.cancelled)} are",
        list(_wrong_ends(evidence)),
    )


def stock_adds_up(evidence: Evidence) -> Finding:
    books, confirmed = evidence.books, evidence.confirmed
    sold = Counter[str]()
    for line in books.ordered:
        if line.order_id in confirmed:
            sold[line.sku] += line.quantity
    first, now = sum(evidence.shop.stock.values()), sum(books.stock.values())
    return Finding(
        "Stock: at first − confirmed orders = what is left",
        f"{first} − {sold.total()} = {now}",
        [
            *(
                f"{sku}: {first} − {sold[sku]} sold, but {books.stock.get(sku)} are left"
                for sku, first in evidence.shop.stock.items()
                if first - sold[sku] != books.stock.get(sku)
            ),
            *(
                f"{line.quantity} of {line.sku} are shown as reserved by order {line.order_id}"
                for line in books.pending
            ),
            *_differences(
                "reservation",
                {(line.order_id, line.sku, line.quantity) for line in books.reserved},
                {
                    (line.order_id, line.sku, line.quantity)
                    for line in books.ordered
                    if line.order_id in confirmed
                },
            ),
        ],
    )


def points_add_up(evidence: Evidence) -> Finding:
    books = evidence.books
    earned = Counter[str]()
    for order in evidence.confirmed.values():
        earned[order.customer_id] += order.total_cents // CENTS_PER_POINT
    return Finding(
        "Points: those of confirmed orders and no others",
        f"{earned.total()} earned, {sum(books.points.values())} there",
        [
            *(
                f"{user} has {points} points and earned {earned[user]}"
                for user, points in books.points.items()
                if points != earned[user]
            ),
            *_differences(
                "entry of points",
                {(entry.order_id, entry.user_id, entry.points) for entry in books.entries},
                {
                    (order.id, order.customer_id, order.total_cents // CENTS_PER_POINT)
                    for order in evidence.confirmed.values()
                },
            ),
        ],
    )


def shipments_match(evidence: Evidence) -> Finding:
    shipments = evidence.books.shipments.values()
    active = {
        (each.order_id, each.tracking_number) for each in shipments if each.status == "active"
    }
    wanted = {(order.id, order.tracking_number) for order in evidence.confirmed.values()}
    return Finding(
        "Shipments: one per confirmed order and no others",
        f"{len(active)} active, {len(shipments) - len(active)} cancelled on the way",
        list(_differences("active shipment", active, wanted)),
    )


def nothing_happened_twice(evidence: Evidence) -> Finding:
    """Analytics counts with `+ 1`, so each second effect of one event would show."""
    books = evidence.books
    handled = Counter(row.handler for row in books.ledgers["analytics"].received)
    counted = {
        "analytics.count_created": books.counters.get("orders created", 0),
        "analytics.count_confirmed": books.counters.get("orders confirmed", 0),
        "analytics.count_cancelled": books.counters.get("orders cancelled", 0),
        "analytics.count_rejection": sum(
            value for name, value in books.counters.items() if name.endswith("Rejected said")
        ),
    }
    runs = Counter(
        (name, step.step, step.saga_id)
        for name, ledger in books.ledgers.items()
        for step in ledger.steps
    )
    return Finding(
        "No event had an effect twice",
        f"{sum(counted.values())} events counted by analytics, {runs.total()} steps run",
        [
            *(
                f"{handler} handled {handled[handler]} events and counted {value}"
                for handler, value in counted.items()
                if handled[handler] != value
            ),
            *(
                f"{name}.{step} ran {times} times in saga {saga}"
                for (name, step, saga), times in runs.items()
                if times > 1
            ),
        ],
    )


def services_agree(evidence: Evidence) -> Finding:
    books = evidence.books
    participants = {name: ledger for name, ledger in books.ledgers.items() if name != "analytics"}
    ends = {"confirmed": "completed", "cancelled": "compensated"}
    violations = []
    for order in books.orders.values():
        for name, ledger in participants.items():
            saga = ledger.sagas.get(order.id)
            state = "unknown" if saga is None else saga.state
            if state != ends.get(order.status):
                violations.append(f"order {order.id} is {order.status}, its saga {state} in {name}")
    return Finding(
        "All services agree how each order ended",
        f"{len(books.orders)} sagas in {len(participants)} databases",
        violations,
    )


def nothing_is_left_over(evidence: Evidence) -> Finding:
    ledgers = evidence.books.ledgers
    left = {
        f"{name}: {what}": count
        for name, ledger in ledgers.items()
        for what, count in (
            ("deliveries still owed", ledger.owed),
            ("dead letters", ledger.dead),
            ("quarantined messages", ledger.quarantined),
            ("sagas stuck", sum(saga.stuck for saga in ledger.sagas.values())),
        )
    }
    return Finding(
        "Nothing is stuck, owed or dead",
        f"{sum(left.values())} left over in {len(ledgers)} databases",
        [f"{what}: {count}" for what, count in left.items() if count],
    )


def events_arrived(evidence: Evidence) -> Finding:
    traffic = evidence.traffic
    return Finding(
        "Every event reached its subscribers, none made up",
        f"{len(traffic.lost)} lost, {len(traffic.phantom)} phantom",
        [*map(str, traffic.lost), *traffic.phantom],
    )


CHECKS: tuple[Callable[[Evidence], Finding], ...] = (
    every_order_ended,
    every_order_ended_rightly,
    stock_adds_up,
    points_add_up,
    shipments_match,
    services_agree,
    nothing_happened_twice,
    events_arrived,
    nothing_is_left_over,
)


def _wrong_ends(evidence: Evidence) -> Iterator[str]:
    orders = evidence.books.orders
    rare_confirmed = 0
    for each in evidence.accepted:
        order = orders.get(each.order_id)
        if order is None or order.settled_at is None:
            continue
        is_confirmed = order.status == "confirmed"
        if each.planned.kind is Kind.RARE:
            rare_confirmed += is_confirmed
        elif is_confirmed != (each.planned.kind is Kind.FINE):
            yield f"order {order.id} ({each.planned.kind}) is {order.status}: {order.reason}"
        if not is_confirmed and order.reason is None:
            yield f"order {order.id} was cancelled without a reason"
    wanted = _wanting_the_rare(evidence)
    if rare_confirmed != min(wanted, RARE_IN_STOCK):
        yield f"{rare_confirmed} got the rare product; {wanted} wanted one of {RARE_IN_STOCK}"


def _must_be_cancelled(evidence: Evidence) -> int:
    difficult = sum(each.planned.kind is not Kind.FINE for each in evidence.accepted)
    return difficult - min(_wanting_the_rare(evidence), RARE_IN_STOCK)


def _wanting_the_rare(evidence: Evidence) -> int:
    return sum(each.planned.kind is Kind.RARE for each in evidence.accepted)


def _differences(what: str, there: Rows, wanted: Rows) -> Iterable[str]:
    for row in sorted(there - wanted, key=str):
        yield f"{what} too many: {_shown_row(row)}"
    for row in sorted(wanted - there, key=str):
        yield f"{what} missing: {_shown_row(row)}"


def _shown_row(row: tuple[object, ...]) -> str:
    return ", ".join(map(str, row))
