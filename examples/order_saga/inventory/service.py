"""Inventory's part in an order: take the items out of the stock, or put them back."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from examples.order_saga.contracts import Item, OrderCreated, StockRejected, StockReserved
from examples.order_saga.inventory.models import Reservation, Stock
from saga import Participant, Reject
from saga.isolation import SemanticLock

inventory = Participant("inventory")
pending = SemanticLock(inventory, Reservation.pending_saga)


@inventory.step(on=OrderCreated, emits=StockReserved, rejects=StockRejected)
def reserve_stock(order: OrderCreated, session: Session) -> StockReserved:
    for item in in_lock_order(order.items):
        if not take(item, session):
            raise Reject(
                StockRejected(
                    order_id=order.order_id,
                    reason=f"fewer than {item.quantity} of {item.sku} are left",
                )
            )
        session.add(
            Reservation(
                order_id=order.order_id,
                sku=item.sku,
                quantity=item.quantity,
                pending_saga=pending.holder(),
            )
        )
    return StockReserved(order_id=order.order_id)


@reserve_stock.compensation
def release_stock(order: OrderCreated, _reserved: StockReserved, session: Session) -> None:
    for item in in_lock_order(order.items):
        put_back(item, session)
    session.execute(delete(Reservation).where(Reservation.order_id == order.order_id))


def take(item: Item, session: Session) -> bool:
    """Whether there was enough. Asking and taking are one statement, so nothing is sold twice."""
    taken = session.execute(
        update(Stock)
        .where(Stock.sku == item.sku, Stock.available >= item.quantity)
        .values(available=Stock.available - item.quantity)
        .returning(Stock.sku)
    )
    return taken.first() is not None


def put_back(item: Item, session: Session) -> None:
    session.execute(
        update(Stock).where(Stock.sku == item.sku).values(available=Stock.available + item.quantity)
    )


def in_lock_order(items: Iterable[Item]) -> list[Item]:
    """Two orders for the same items, each holding what the other waits for, would be a deadlock."""
    return sorted(items, key=lambda item: item.sku)
