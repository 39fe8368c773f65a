"""Inventory's own tables."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import CheckConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The tables of this service."""


class Stock(Base):
    """How many of a product can still be sold."""

    __tablename__ = "stock"
    __table_args__ = (CheckConstraint("available >= 0"),)

    sku: Mapped[str] = mapped_column(primary_key=True)
    available: Mapped[int]


class Reservation(Base):
    """What an order has taken out of the stock."""

    __tablename__ = "reservation"

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(primary_key=True)
    quantity: Mapped[int]
    pending_saga: Mapped[UUID | None]
    """The order's saga; the items are sold once it is completed (see `stock.py`)."""
