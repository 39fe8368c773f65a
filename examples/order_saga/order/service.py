"""The order's own part: it begins the saga, hears three answers, and confirms or cancels.

It knows which answers it waits for, but not who gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from examples.order_saga.contracts import (
    Item,
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    PointsAdded,
    PointsRejected,
    ShipmentCreated,
    ShipmentRejected,
    StockRejected,
    StockReserved,
)
from examples.order_saga.order.models import CANCELLED, CONFIRMED, Order, OrderItem, Product
from saga import Participant

order = Participant("order")
order.publishes(OrderCancelled)


class UnknownProducts(Exception):
    """Somebody ordered what is not sold here."""

    def __init__(self, skus: set[str]) -> None:
        super().__init__(f"there is no product {', '.join(sorted(skus))}")


def place_order(
    session: Session,
    *,
    order_id: UUID,
    customer_id: str,
    country: str,
    quantities: Mapping[str, int],
) -> None:
    """Store the order and begin its saga, in the caller's transaction.

    Raises `UnknownProducts`, and `AlreadyStarted` where the order has been placed before.
    """
    total_cents = total(session, quantities)
    items = tuple(Item(sku=sku, quantity=quantity) for sku, quantity in quantities.items())
    created = OrderCreated(
        order_id=order_id,
        customer_id=customer_id,
        country=country,
        items=items,
        total_cents=total_cents,
    )
    order.start(session, created, saga_id=order_id)
    session.add(
        Order(
            id=order_id,
            customer_id=customer_id,
            country=country,
            total_cents=total_cents,
            items=[OrderItem(sku=item.sku, quantity=item.quantity) for item in items],
        )
    )


@order.compensation(OrderCreated)
def cancel_order(created: OrderCreated, session: Session) -> None:
    session.execute(
        update(Order)
        .where(Order.id == created.order_id)
        .values(status=CANCELLED, settled_at=func.clock_timestamp())
    )
    order.publish(session, OrderCancelled(order_id=created.order_id))


@order.join(
    StockReserved,
    PointsAdded,
    ShipmentCreated,
    emits=OrderConfirmed,
    completes=True,
    no_deadline="an order is worth more than an hour: it waits for whoever is down",
)
def confirm_order(
    stock: StockReserved, _points: PointsAdded, shipment: ShipmentCreated, session: Session
) -> OrderConfirmed:
    session.execute(
        update(Order)
        .where(Order.id == stock.order_id)
        .values(
            status=CONFIRMED,
            tracking_number=shipment.tracking_number,
            settled_at=func.clock_timestamp(),
        )
    )
    return OrderConfirmed(order_id=stock.order_id, tracking_number=shipment.tracking_number)


@order.on(StockRejected, PointsRejected, ShipmentRejected)
def note_reason(
    rejection: StockRejected | PointsRejected | ShipmentRejected, session: Session
) -> None:
    session.execute(
        update(Order)
        .where(Order.id == rejection.order_id, Order.reason.is_(None))
        .values(reason=rejection.reason)
    )


def total(session: Session, quantities: Mapping[str, int]) -> int:
    rows = session.execute(
        select(Product.sku, Product.price_cents).where(Product.sku.in_(quantities))
    )
    prices = {row.sku: row.price_cents for row in rows}
    if unknown := quantities.keys() - prices.keys():
        raise UnknownProducts(unknown)
    return sum(prices[sku] * quantity for sku, quantity in quantities.items())
