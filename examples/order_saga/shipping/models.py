"""Shipping's own tables."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import CheckConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The tables of this service."""


class ServedCountry(Base):
    """A country that parcels are sent to."""

    __tablename__ = "served_country"

    code: Mapped[str] = mapped_column(primary_key=True)


class Shipment(Base):
    """A parcel for one order."""

    __tablename__ = "shipment"
    __table_args__ = (CheckConstraint("status IN ('active', 'cancelled')"),)

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    tracking_number: Mapped[str] = mapped_column(unique=True)
    country: Mapped[str]
    status: Mapped[str] = mapped_column(default="active")
