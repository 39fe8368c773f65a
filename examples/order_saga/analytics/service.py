"""Analytics: listens to what the others say anyway, and counts. It takes part in no saga."""

from __future__ import annotations

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from examples.order_saga.analytics.models import Counter
from examples.order_saga.contracts import (
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    PointsRejected,
    ShipmentRejected,
    StockRejected,
)
from outbox import Service

analytics = Service("analytics")


@analytics.on(OrderCreated)
def count_created(order: OrderCreated, session: Session) -> None:
    add("orders created", 1, session)
    add("cents ordered", order.total_cents, session)
    add(f"orders from {order.country}", 1, session)


@analytics.on(OrderConfirmed)
def count_confirmed(_order: OrderConfirmed, session: Session) -> None:
    add("orders confirmed", 1, session)


@analytics.on(OrderCancelled)
def count_cancelled(_order: OrderCancelled, session: Session) -> None:
    add("orders cancelled", 1, session)


@analytics.on(StockRejected, PointsRejected, ShipmentRejected)
def count_rejection(
    rejection: StockRejected | PointsRejected | ShipmentRejected, session: Session
) -> None:
    add(f"{type(rejection).__name__} said", 1, session)


def add(name: str, amount: int, session: Session) -> None:
    counter = insert(Counter).values(name=name, value=amount)
    session.execute(
        counter.on_conflict_do_update(
            index_elements=[Counter.name],
            set_={"value": Counter.value + counter.excluded.value},
        )
    )
