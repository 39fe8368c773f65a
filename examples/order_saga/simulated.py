"""The order example under simulation: its services as they are, what is asked of them, what must hold in the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from uuid import UUID

from sqlalchemy import MetaData
from sqlalchemy.orm import Session

from examples.order_saga.analytics import models as analytics_models
from examples.order_saga.analytics.service import analytics
from examples.order_saga.inventory import models as inventory_models
from examples.order_saga.inventory.service import inventory
from examples.order_saga.order import models as order_models
from examples.order_saga.order.service import order, place_order
from examples.order_saga.shipping import models as shipping_models
from examples.order_saga.shipping.service import shipping
from examples.order_saga.users import models as users_models
from examples.order_saga.users.service import users
from outbox.service import Service
from saga.testing.simulation import Faults, Request, Simulation
from saga.testing.world import SimulatedService, World

STOCK = {"lamp": 2, "chair": 5}
PRICE = 100

ORDERS = (
    ("alice", "DE", {"lamp": 1, "chair": 1}),
    ("mallory", "DE", {"lamp": 1}),
    ("bob", "AQ", {"lamp": 1}),
    ("alice", "DE", {"lamp": 2}),
)
"""One that everybody likes, a blocked customer, a country that is not served, and more than may be left."""


def simulation(faults: Faults | None = None, *, sample: int | None = 2) -> Simulation:
    """The order example, ready to be run over as many schedules as you like, with *sample* of the orders in each."""
    return Simulation(
        services=[
            _service(order, order_models.Base.metadata, _products),
            _service(inventory, inventory_models.Base.metadata, _stock),
            _service(users, users_models.Base.metadata, _customers),
            _service(shipping, shipping_models.Base.metadata, _countries),
            _service(analytics, analytics_models.Base.metadata, None),
        ],
        requests=[_placing(number, *one) for number, one in enumerate(ORDERS, 1)],
        invariants=[every_order_is_whole, analytics_has_counted_each_order_once],
        faults=faults or Faults(),
        sample=sample,
    )


def one_order(number: int) -> Simulation:
    """A choreography small enough to be explored: one of the `ORDERS`, and nobody who only listens."""
    whole = simulation(sample=None)
    return Simulation(
        services=[one for one in whole.services if one.service is not analytics],
        requests=[whole.requests[number]],
        invariants=[every_order_is_whole],
    )


def every_order_is_whole(world: World) -> None:
    """Confirmed: everyone did their part, once. Cancelled: nothing of it is left anywhere."""
    orders = {row.id: row.status for row in world["order"].query("SELECT id, status FROM orders")}
    confirmed = {order_id for order_id, status in orders.items() if status == "confirmed"}
    assert set(orders.values()) <= {"confirmed", "cancelled"}, f"orders are left open: {orders}"
    reserved = world["inventory"].query("SELECT order_id, sku, quantity FROM reservation")
    assert {row.order_id for row in reserved} == confirmed, (
        "reservations are not those of the confirmed orders"
    )
    for sku, available in world["inventory"].query("SELECT sku, available FROM stock"):
        taken = sum(row.quantity for row in reserved if row.sku == sku)
        assert available + taken == STOCK[sku], (
            f"of {STOCK[sku]} {sku}, {available} are left and {taken} reserved"
        )
    entries = world["users"].query("SELECT order_id, user_id, points FROM points_entry")
    assert {row.order_id for row in entries} == confirmed, (
        "points are not those of the confirmed orders"
    )
    for user, points in world["users"].query("SELECT id, points FROM users"):
        assert points == sum(row.points for row in entries if row.user_id == user), (
            f"{user} has {points} points"
        )
    shipments = world["shipping"].query("SELECT order_id, status FROM shipment")
    active = {row.order_id for row in shipments if row.status == "active"}
    assert active == confirmed, "shipments are not those of the confirmed orders"


def analytics_has_counted_each_order_once(world: World) -> None:
    counted = {
        row.name: row.value for row in world["analytics"].query("SELECT name, value FROM counter")
    }
    placed = [row.status for row in world["order"].query("SELECT status FROM orders")]
    assert counted.get("orders created", 0) == len(placed)
    assert counted.get("orders confirmed", 0) == placed.count("confirmed")
    assert counted.get("orders cancelled", 0) == placed.count("cancelled")


def _service(
    service: Service, tables: MetaData, fill: Callable[[Session], None] | None
) -> SimulatedService:
    return SimulatedService(service, create=tables.create_all, fill=fill)


def _products(session: Session) -> None:
    session.add_all(order_models.Product(sku=sku, price_cents=PRICE) for sku in STOCK)


def _stock(session: Session) -> None:
    session.add_all(
        inventory_models.Stock(sku=sku, available=count) for sku, count in STOCK.items()
    )


def _customers(session: Session) -> None:
    session.add_all([users_models.User(id="alice"), users_models.User(id="bob")])
    session.add(users_models.User(id="mallory", blocked=True))


def _countries(session: Session) -> None:
    session.add(shipping_models.ServedCountry(code="DE"))


def _placing(number: int, customer: str, country: str, quantities: dict[str, int]) -> Request:
    place = partial(
        place_order,
        order_id=UUID(int=number),
        customer_id=customer,
        country=country,
        quantities=quantities,
    )
    return Request("order", place, name=f"{customer} orders {quantities}")


if __name__ == "__main__":
    from saga.testing import command

    command.run(simulation())
