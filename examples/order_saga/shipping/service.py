"""Shipping's part in an order: create a shipment, or cancel it."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import update
from sqlalchemy.orm import Session

from examples.order_saga.contracts import OrderCreated, ShipmentCreated, ShipmentRejected
from examples.order_saga.shipping.models import ServedCountry, Shipment
from saga import Participant, Reject

shipping = Participant("shipping")


@shipping.step(on=OrderCreated, emits=ShipmentCreated, rejects=ShipmentRejected)
def create_shipment(order: OrderCreated, session: Session) -> ShipmentCreated:
    if session.get(ServedCountry, order.country) is None:
        reason = f"nothing is shipped to {order.country}"
        raise Reject(ShipmentRejected(order_id=order.order_id, reason=reason))
    shipment = Shipment(
        order_id=order.order_id,
        tracking_number=tracking_number(order.order_id),
        country=order.country,
    )
    session.add(shipment)
    return ShipmentCreated(order_id=order.order_id, tracking_number=shipment.tracking_number)


@create_shipment.compensation
def cancel_shipment(order: OrderCreated, _created: ShipmentCreated, session: Session) -> None:
    session.execute(
        update(Shipment).where(Shipment.order_id == order.order_id).values(status="cancelled")
    )


def tracking_number(order_id: UUID) -> str:
    return f"SHIP-{order_id.hex.upper()}"
