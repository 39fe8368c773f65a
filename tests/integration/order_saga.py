"""The order saga's services on databases of their own, played without a broker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session

from examples.order_saga.analytics import models as analytics_models
from examples.order_saga.analytics.service import analytics
from examples.order_saga.inventory import models as inventory_models
from examples.order_saga.inventory.service import inventory
from examples.order_saga.inventory.stock import Shown, shown
from examples.order_saga.order import models as order_models
from examples.order_saga.order.models import Order
from examples.order_saga.order.service import order, place_order
from examples.order_saga.shipping import models as shipping_models
from examples.order_saga.shipping.service import shipping
from examples.order_saga.users import models as users_models
from examples.order_saga.users.service import users
from saga.testing.choreography import Choreography

MODELS = {
    order: order_models.Base,
    inventory: inventory_models.Base,
    users: users_models.Base,
    shipping: shipping_models.Base,
    analytics: analytics_models.Base,
}
STOCK = {"chair": 2, "lamp": 10}


def rows() -> dict[Any, list[object]]:
    """What there is before the first order."""
    return {
        order: [order_models.Product(sku=sku, price_cents=1000) for sku in STOCK],
        inventory: [inventory_models.Stock(sku=sku, available=n) for sku, n in STOCK.items()],
        users: [users_models.User(id="alice"), users_models.User(id="mallory", blocked=True)],
        shipping: [shipping_models.ServedCountry(code="DE")],
    }


class OrderSaga:
    """Five databases, and what a test wants to know of them."""

    def __init__(self, database_urls: Mapping[str, str]) -> None:
        self.engines = {service: create_engine(database_urls[service.name]) for service in MODELS}
        for service, base in MODELS.items():
            base.metadata.create_all(self.engines[service])

    def open(self) -> None:
        """Begin anew: nothing ordered, nothing on its way."""
        for service, base in MODELS.items():
            with Session(self.engines[service]) as session, session.begin():
                for table in reversed(base.metadata.sorted_tables):
                    session.execute(table.delete())
                session.execute(text("DELETE FROM outbox.pending_delivery"))
                session.add_all(rows().get(service, []))
        self.play = Choreography(self.engines)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.dispose()

    def place(
        self,
        customer_id: str = "alice",
        country: str = "DE",
        order_id: UUID | None = None,
        quantities: Mapping[str, int] | None = None,
    ) -> UUID:
        order_id = order_id or uuid4()
        with Session(self.engines[order]) as session, session.begin():
            place_order(
                session,
                order_id=order_id,
                customer_id=customer_id,
                country=country,
                quantities=quantities or {"lamp": 2, "chair": 1},
            )
        return order_id

    def order(self, order_id: UUID) -> Order:
        with Session(self.engines[order]) as session:
            return session.get_one(Order, order_id)

    @property
    def stock(self) -> dict[str, int]:
        stock = inventory_models.Stock
        return self._pairs(inventory, select(stock.sku, stock.available))

    @property
    def reservations(self) -> list[tuple[UUID, str, int]]:
        row = inventory_models.Reservation
        return self._rows(inventory, select(row.order_id, row.sku, row.quantity).order_by(row.sku))

    @property
    def shown(self) -> dict[str, Shown]:
        """The stock as inventory shows it."""
        with Session(self.engines[inventory]) as session:
            return shown(session)

    @property
    def points(self) -> dict[str, int]:
        user = users_models.User
        return self._pairs(users, select(user.id, user.points))

    @property
    def shipments(self) -> dict[UUID, str]:
        shipment = shipping_models.Shipment
        return self._pairs(shipping, select(shipment.order_id, shipment.status))

    @property
    def counters(self) -> dict[str, int]:
        counter = analytics_models.Counter
        return self._pairs(analytics, select(counter.name, counter.value))

    def _pairs(self, service: Any, query: Any) -> dict[Any, Any]:
        return dict(self._rows(service, query))

    def _rows(self, service: Any, query: Any) -> list[Any]:
        with Session(self.engines[service]) as session:
            return [tuple(row) for row in session.execute(query)]
