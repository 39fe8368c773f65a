"""The stock as people are shown it: what a pending order has reserved is neither for sale nor sold yet."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from examples.order_saga.inventory.models import Reservation, Stock
from examples.order_saga.inventory.service import pending


@dataclass(frozen=True)
class Shown:
    """One product, counted in pieces."""

    available: int
    reserved: int
    """Taken out for orders that are not decided: sold or available again, a moment later."""
    sold: int


def shown(session: Session) -> dict[str, Shown]:
    """Each product, by its sku, in one consistent reading."""
    pieces = func.sum(Reservation.quantity)
    rows = session.execute(
        select(
            Stock.sku,
            Stock.available,
            func.coalesce(pieces.filter(pending.is_pending()), 0).label("reserved"),
            func.coalesce(pieces.filter(pending.is_free()), 0).label("sold"),
        )
        .join(Reservation, Reservation.sku == Stock.sku, isouter=True)
        .group_by(Stock.sku, Stock.available)
    )
    return {row.sku: Shown(row.available, row.reserved, row.sold) for row in rows}
