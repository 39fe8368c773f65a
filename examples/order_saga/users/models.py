"""The users service's own tables."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The tables of this service."""


class User(Base):
    """A customer."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(primary_key=True)
    blocked: Mapped[bool] = mapped_column(default=False)
    points: Mapped[int] = mapped_column(default=0)


class PointsEntry(Base):
    """The points that an order has brought its customer."""

    __tablename__ = "points_entry"

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    points: Mapped[int]
