"""What the services say to each other. This file is all that they share.

A service may add a field with a default at any time; taking one away, or giving one another meaning, makes a new
version.
"""

from __future__ import annotations

from uuid import UUID

from pydantic import BaseModel, ConfigDict

from outbox import event


class Fact(BaseModel):
    """Something that has happened to an order."""

    model_config = ConfigDict(frozen=True)

    order_id: UUID


class Item(BaseModel):
    """A product and how many of it."""

    model_config = ConfigDict(frozen=True)

    sku: str
    quantity: int


# ---- said by order ----


@event("order.created", version=1, key="order_id")
class OrderCreated(Fact):
    """A customer wants these items, sent to this country."""

    customer_id: str
    country: str
    """ISO 3166 code of two letters."""
    items: tuple[Item, ...]
    total_cents: int


@event("order.confirmed", version=1, key="order_id")
class OrderConfirmed(Fact):
    """Stock, points and shipment are all there."""

    tracking_number: str


@event("order.cancelled", version=1, key="order_id")
class OrderCancelled(Fact):
    """Somebody said no; whatever was done for the order is undone."""


# ---- said by inventory ----


@event("stock.reserved", version=1, key="order_id")
class StockReserved(Fact):
    """All items were taken out of the stock."""


@event("stock.rejected", version=1, key="order_id")
class StockRejected(Fact):
    """There is not enough of an item."""

    reason: str


# ---- said by users ----


@event("points.added", version=1, key="order_id")
class PointsAdded(Fact):
    """The customer was given points for the order."""

    points: int


@event("points.rejected", version=1, key="order_id")
class PointsRejected(Fact):
    """The customer may not buy."""

    reason: str


# ---- said by shipping ----


@event("shipment.created", version=1, key="order_id")
class ShipmentCreated(Fact):
    """A parcel is on its way to the customer."""

    tracking_number: str


@event("shipment.rejected", version=1, key="order_id")
class ShipmentRejected(Fact):
    """Nothing is sent to that country."""

    reason: str
