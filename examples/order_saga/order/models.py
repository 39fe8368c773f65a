"""The order service's own tables."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, DateTime, ForeignKey, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

CREATED = "created"
"""Undecided: the saga runs, and nobody may take the order for granted (a semantic lock)."""
CONFIRMED = "confirmed"
CANCELLED = "cancelled"


class Base(DeclarativeBase):
    """The tables of this service."""


class Product(Base):
    """Something that can be ordered, and its price."""

    __tablename__ = "product"

    sku: Mapped[str] = mapped_column(primary_key=True)
    price_cents: Mapped[int]


class Order(Base):
    """What a customer ordered, and what became of it."""

    __tablename__ = "orders"
    __table_args__ = (
        CheckConstraint("status IN ('created', 'confirmed', 'cancelled')"),
        CheckConstraint("(status = 'created') = (settled_at IS NULL)"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    customer_id: Mapped[str]
    country: Mapped[str]
    total_cents: Mapped[int]
    status: Mapped[str] = mapped_column(default=CREATED)
    reason: Mapped[str | None]
    """Who said no, in words; the first of them, if several did."""
    tracking_number: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp()
    )
    settled_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    items: Mapped[list[OrderItem]] = relationship(lazy="selectin", order_by="OrderItem.sku")


class OrderItem(Base):
    """One product of an order."""

    __tablename__ = "order_item"
    __table_args__ = (CheckConstraint("quantity > 0"),)

    order_id: Mapped[UUID] = mapped_column(ForeignKey(Order.id), primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey(Product.sku), primary_key=True)
    quantity: Mapped[int]
