"""The figures of a run, all counted: from the books, and from the customers' own clocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from examples.order_saga.demo.audit import Evidence, Finding, audit
from examples.order_saga.demo.shop import Shop
from examples.order_saga.demo.story import LATECOMER, VICTIM, Told


@dataclass(frozen=True)
class Outage:
    """What the death of one service meant for the others, by the databases' clock."""

    service: str
    lasted_seconds: float
    accepted_meanwhile: int
    handled_meanwhile: int
    """Events that the dead service handled: none, if it was dead."""
    caught_up: bool
    """Whether it has had every event from before its return, and all their orders ended."""
    caught_up_seconds: float
    """From its restart until it had handled the last event from before its return."""


@dataclass(frozen=True)
class Latecomer:
    """What the service saw that was added while the others ran."""

    service: str
    orders_seen: int
    counters: Mapping[str, int]


@dataclass(frozen=True)
class Summary:
    """All there is to report."""

    told: Told
    findings: Sequence[Finding]
    orders: Mapping[str, int]
    rejections: Mapping[str, int]
    """How many orders each service said no to."""
    undone: int
    """Steps that were done and then undone, the orders' own beginnings aside."""
    accept_ms: Sequence[float]
    settle_ms: Sequence[float]
    settle_ms_apart_from_outage: Sequence[float]
    outage: Outage
    latecomer: Latecomer

    @property
    def violations(self) -> list[str]:
        return [violation for finding in self.findings for violation in finding.violations]

    def as_json(self) -> dict[str, Any]:
        traffic = self.told.traffic
        return {
            "orders": dict(self.orders),
            "audit": {"violations": self.violations},
            "events": {
                "published": traffic.published,
                "lost": len(traffic.lost),
                "phantom": len(traffic.phantom),
                "redelivered": traffic.redelivered,
                "absorbed": traffic.absorbed,
            },
            "latency_ms": {
                "accept": {"p50": percentile(self.accept_ms, 50), "p99": percentile(self.accept_ms, 99)},
                "settle": {"p50": percentile(self.settle_ms, 50), "p99": percentile(self.settle_ms, 99)},
            },
            "outage": {
                "service": self.outage.service,
                "orders_accepted_meanwhile": self.outage.accepted_meanwhile,
                "caught_up": self.outage.caught_up,
            },
        }  # fmt: skip


def summarize(shop: Shop, told: Told) -> Summary:
    evidence = Evidence(told.books, shop, told.accepted, told.refused, told.traffic)
    orders = told.books.orders.values()
    by_status = Counter(order.status for order in orders)
    steps = [(name, step) for name, ledger in told.books.ledgers.items() for step in ledger.steps]
    stuck = {
        saga.saga_id
        for ledger in told.books.ledgers.values()
        for saga in ledger.sagas.values()
        if saga.stuck
    }
    return Summary(
        told=told,
        findings=audit(evidence),
        orders={
            "placed": len(told.accepted),
            "confirmed": by_status["confirmed"],
            "cancelled": by_status["cancelled"],
            "pending": by_status["created"],
            "stuck": len(stuck),
        },
        rejections=Counter(name for name, step in steps if step.state == "rejected"),
        undone=sum(name != "order" and step.state == "compensated" for name, step in steps),
        accept_ms=[each.answered_in_ms for each in told.accepted],
        settle_ms=_settle_ms(told, with_outage=True),
        settle_ms_apart_from_outage=_settle_ms(told, with_outage=False),
        outage=_outage(told),
        latecomer=_latecomer(told),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that *percent* of all are not above; 0 of none."""
    if not values:
        return 0.0
    return round(sorted(values)[ceil(len(values) * percent / 100) - 1], 1)


def _settle_ms(told: Told, *, with_outage: bool) -> list[float]:
    return [
        (order.settled_at - order.created_at).total_seconds() * 1000
        for order in told.books.orders.values()
        if order.settled_at is not None
        and (with_outage or order.settled_at < told.killed_at or order.created_at > told.back_at)
    ]


def _outage(told: Told) -> Outage:
    books = told.books
    received = books.ledgers[VICTIM].received
    before_return = {
        event.event_id: event.key
        for event in books.ledgers["order"].published
        if event.type == "order.created" and event.occurred_at < told.back_at
    }
    handled_at = {
        row.event_id: row.received_at
        for row in received
        if row.handler == f"{VICTIM}.add_points" and row.event_id in before_return
    }
    settled = {str(order.id) for order in books.orders.values() if order.settled_at}
    last = max(handled_at.values(), default=told.restarted_at)
    return Outage(
        service=VICTIM,
        lasted_seconds=(told.restarted_at - told.killed_at).total_seconds(),
        accepted_meanwhile=sum(
            told.killed_at < order.created_at < told.restarted_at for order in books.orders.values()
        ),
        handled_meanwhile=sum(
            told.killed_at < row.received_at < told.restarted_at for row in received
        ),
        caught_up=handled_at.keys() == before_return.keys()
        and settled.issuperset(key for key in before_return.values() if key is not None),
        caught_up_seconds=max((last - told.restarted_at).total_seconds(), 0.0),
    )


def _latecomer(told: Told) -> Latecomer:
    counters = told.books.counters
    return Latecomer(LATECOMER, counters.get("orders created", 0), counters)
