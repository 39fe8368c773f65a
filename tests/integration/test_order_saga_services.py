"""The order saga on real databases: each step, each compensation, and that every order ends whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from uuid import uuid4

import pytest

from examples.order_saga.inventory.stock import Shown
from saga import AlreadyStarted
from saga.testing.choreography import Message
from tests.databases import Databases
from tests.integration.order_saga import MODELS, STOCK, OrderSaga


@pytest.fixture(scope="module")
def five_databases(databases: Databases) -> Iterator[OrderSaga]:
    urls = {service.name: databases.create_migrated() for service in MODELS}
    made = OrderSaga(urls)
    yield made
    made.close()
    for url in urls.values():
        databases.drop(url)


@pytest.fixture
def shop(five_databases: OrderSaga) -> OrderSaga:
    five_databases.open()
    return five_databases


NOTHING_EARNED = {"alice": 0, "mallory": 0}


def test_an_order_that_nobody_objects_to_is_confirmed_by_all(shop: OrderSaga) -> None:
    order_id = shop.place(quantities={"lamp": 2, "chair": 1})
    assert shop.order(order_id).status == "created"
    shop.play.settle()
    order = shop.order(order_id)
    assert (order.status, order.reason) == ("confirmed", None)
    assert order.tracking_number == f"SHIP-{order_id.hex.upper()}"
    assert shop.stock == {"lamp": 8, "chair": 1}
    assert shop.reservations == [(order_id, "chair", 1), (order_id, "lamp", 2)]
    assert shop.points == {"alice": 30, "mallory": 0}
    assert shop.shipments == {order_id: "active"}


def test_what_a_pending_order_has_reserved_is_neither_for_sale_nor_shown_as_sold(
    shop: OrderSaga,
) -> None:
    shop.place(quantities={"chair": 2})
    seen: list[Shown] = []

    def step_by_step(waiting: Sequence[Message]) -> Message:
        seen.append(shop.shown["chair"])
        return waiting[0]

    shop.play.settle(step_by_step)
    assert list(dict.fromkeys(seen)) == [Shown(2, 0, 0), Shown(0, 2, 0), Shown(0, 0, 2)]


def test_what_a_pending_order_has_reserved_is_not_sold_twice_and_comes_back_when_it_is_cancelled(
    shop: OrderSaga,
) -> None:
    pending = shop.place(country="AQ", quantities={"chair": 2})
    created = next(one for one in shop.play.collect() if one.service == "inventory")
    shop.play.deliver(created)
    too_late = shop.place(quantities={"chair": 1})
    created = next(
        one for one in shop.play.collect() if (one.service, one.type) == ("inventory", created.type)
    )
    shop.play.deliver(created)
    assert shop.shown["chair"] == Shown(available=0, reserved=2, sold=0)
    shop.play.settle()
    assert {shop.order(id).status for id in (pending, too_late)} == {"cancelled"}
    assert shop.shown["chair"] == Shown(available=2, reserved=0, sold=0)


def test_an_order_for_more_than_there_is_leaves_no_item_taken(shop: OrderSaga) -> None:
    order_id = shop.place(quantities={"chair": 1, "lamp": 11})
    shop.play.settle()
    order = shop.order(order_id)
    assert (order.status, order.reason) == ("cancelled", "fewer than 11 of lamp are left")
    assert shop.stock == STOCK
    assert shop.reservations == []
    assert shop.points == NOTHING_EARNED
    assert shop.shipments.get(order_id) in (None, "cancelled")


@pytest.mark.parametrize("customer", ["mallory", "nobody-we-know"])
def test_a_customer_who_is_not_welcome_leaves_nothing_taken(shop: OrderSaga, customer: str) -> None:
    order_id = shop.place(customer_id=customer)
    shop.play.settle()
    order = shop.order(order_id)
    assert order.status == "cancelled"
    assert order.reason == f"customer {customer} is blocked or unknown"
    assert shop.stock == STOCK
    assert shop.reservations == []
    assert shop.points == NOTHING_EARNED
    assert shop.shipments.get(order_id) in (None, "cancelled")


def test_an_address_that_is_not_served_takes_stock_and_points_back(shop: OrderSaga) -> None:
    order_id = shop.place(country="AQ")
    shop.play.settle(choose=shipping_last)
    order = shop.order(order_id)
    assert (order.status, order.reason) == ("cancelled", "nothing is shipped to AQ")
    assert order.settled_at is not None
    assert shop.stock == STOCK
    assert shop.reservations == []
    assert shop.points == NOTHING_EARNED
    assert shop.shipments == {}


def test_points_from_other_orders_survive_a_compensation(shop: OrderSaga) -> None:
    unserved = shop.place(country="AQ", quantities={"lamp": 1})
    fine = shop.place(quantities={"lamp": 3})
    shop.play.settle(choose=shipping_last)
    assert shop.order(unserved).status == "cancelled"
    assert shop.order(fine).status == "confirmed"
    assert shop.points == {"alice": 30, "mallory": 0}


def test_a_shipment_that_was_created_is_cancelled_with_the_order(shop: OrderSaga) -> None:
    order_id = shop.place(quantities={"chair": 3})
    shop.play.settle(choose=shipping_first)
    assert shop.shipments == {order_id: "cancelled"}


def test_the_last_item_is_sold_once(shop: OrderSaga) -> None:
    wanting = [shop.place(quantities={"chair": 1}) for _ in range(5)]
    shop.play.settle()
    ends = [shop.order(order_id).status for order_id in wanting]
    assert sorted(ends) == ["cancelled"] * 3 + ["confirmed"] * 2
    assert shop.stock["chair"] == 0


def test_the_first_reason_is_kept_when_two_services_say_no(shop: OrderSaga) -> None:
    order_id = shop.place(customer_id="mallory", country="AQ")
    shop.play.settle()
    reason = shop.order(order_id).reason
    assert reason in ("customer mallory is blocked or unknown", "nothing is shipped to AQ")


def test_every_message_again_changes_nothing(shop: OrderSaga) -> None:
    shop.place(), shop.place(country="AQ"), shop.place(customer_id="mallory")
    shop.play.settle()
    before = shop.stock, shop.reservations, shop.points, shop.shipments, shop.counters
    again = list(shop.play.delivered)
    for message in again:
        shop.play.deliver(message)
    assert len(again) > 20
    assert shop.play.settle() == 0
    assert (shop.stock, shop.reservations, shop.points, shop.shipments, shop.counters) == before


@pytest.mark.parametrize("seed", range(10))
def test_orders_end_whole_in_whatever_order_messages_come(shop: OrderSaga, seed: int) -> None:
    random = Random(seed)
    fine = shop.place(quantities={"lamp": 1})
    unserved = shop.place(country="AQ", quantities={"lamp": 1})
    blocked = shop.place(customer_id="mallory", quantities={"lamp": 1})
    too_many = shop.place(quantities={"chair": 3})
    shop.play.settle(choose=random.choice)
    ends = [shop.order(order_id).status for order_id in (fine, unserved, blocked, too_many)]
    assert ends == ["confirmed", "cancelled", "cancelled", "cancelled"]
    assert shop.stock == {**STOCK, "lamp": 9}
    assert shop.reservations == [(fine, "lamp", 1)]
    assert shop.points == {"alice": 10, "mallory": 0}
    assert [id for id, status in shop.shipments.items() if status == "active"] == [fine]


def test_analytics_counts_what_was_said_without_anyone_saying_it_to_it(shop: OrderSaga) -> None:
    shop.place(quantities={"lamp": 2}), shop.place(country="AQ", quantities={"lamp": 1})
    shop.play.settle()
    assert shop.counters == {
        "orders created": 2,
        "cents ordered": 3000,
        "orders from DE": 1,
        "orders from AQ": 1,
        "orders confirmed": 1,
        "orders cancelled": 1,
        "ShipmentRejected said": 1,
    }


def test_an_order_that_is_placed_again_under_its_id_is_one_order(shop: OrderSaga) -> None:
    order_id = uuid4()
    shop.place(order_id=order_id, quantities={"lamp": 1})
    with pytest.raises(AlreadyStarted):
        shop.place(order_id=order_id, quantities={"lamp": 1})
    shop.play.settle()
    assert shop.order(order_id).status == "confirmed"
    assert shop.stock["lamp"] == 9


def shipping_last(waiting: Sequence[Message]) -> Message:
    return min(waiting, key=lambda message: message.service == "shipping")


def shipping_first(waiting: Sequence[Message]) -> Message:
    return min(waiting, key=lambda message: message.service != "shipping")
