"""The shop's HTTP door: what it answers, and what it has stored by then."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import Engine, text

from examples.order_saga.order import models
from examples.order_saga.order.api import create_app

ORDER = {"customer_id": "alice", "country": "DE", "items": [{"sku": "lamp", "quantity": 2}]}


@pytest.fixture
def engine(migrated_engine: Engine) -> Engine:
    models.Base.metadata.create_all(migrated_engine)
    with migrated_engine.begin() as connection:
        connection.execute(models.Product.__table__.insert(), {"sku": "lamp", "price_cents": 4900})
    return migrated_engine


class Client:
    """Calls the application without a server."""

    def __init__(self, engine: Engine) -> None:
        self._transport = httpx.ASGITransport(create_app(engine), raise_app_exceptions=False)

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://shop") as one:
                return await one.request(method, path, **options)

        return asyncio.run(call())


@pytest.fixture
def client(engine: Engine) -> Client:
    return Client(engine)


def stored(engine: Engine) -> list[Any]:
    """The orders, each with the types of the events about it."""
    query = """
        SELECT o.id, o.status, o.total_cents, array_agg(e.type) AS events
        FROM orders o LEFT JOIN outbox.outbox_event e ON e.key = o.id::text GROUP BY o.id
    """
    with engine.connect() as connection:
        return list(connection.execute(text(query)))


def events(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM outbox.outbox_event"))


def test_an_order_is_accepted_with_its_place_and_its_event(client: Client, engine: Engine) -> None:
    answer = client.post("/orders", json=ORDER)
    assert answer.status_code == 202
    order_id = answer.json()["id"]
    assert answer.json() == {"id": order_id, "status": "created"}
    assert answer.headers["Location"] == f"/orders/{order_id}"
    assert [tuple(row) for row in stored(engine)] == [
        (UUID(order_id), "created", 9800, ["order.created"])
    ]


def test_an_order_can_be_looked_at(client: Client) -> None:
    where = client.post("/orders", json=ORDER).headers["Location"]
    found = client.get(where).json()
    assert found["status"] == "created"
    assert found["items"] == ORDER["items"]
    assert found["total_cents"] == 9800
    assert (found["reason"], found["tracking_number"], found["settled_at"]) == (None, None, None)


def test_asking_again_with_the_same_key_orders_once(client: Client, engine: Engine) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    first = client.post("/orders", json=ORDER, headers=headers)
    again = client.post("/orders", json=ORDER, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.headers["Location"] == again.headers["Location"]
    assert len(stored(engine)) == 1
    assert events(engine) == 1


def test_a_key_that_is_no_uuid_is_refused(client: Client, engine: Engine) -> None:
    answer = client.post("/orders", json=ORDER, headers={"Idempotency-Key": "1"})
    assert answer.status_code == 400
    assert "UUID" in answer.json()["error"]
    assert stored(engine) == []


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no customer": ({"customer_id": ""}, "customer_id"),
    "a customer with a NUL": ({"customer_id": "a\x00b"}, "customer_id"),
    "a country in words": ({"country": "Germany"}, "country"),
    "no items": ({"items": []}, "items"),
    "less than one": ({"items": [{"sku": "lamp", "quantity": 0}]}, "items.0.quantity"),
    "far too many": ({"items": [{"sku": "lamp", "quantity": 10**9}]}, "items.0.quantity"),
    "a product named twice": ({"items": [{"sku": "lamp", "quantity": 1}] * 2}, ""),
    "a field that is not known": ({"coupon": "FREE"}, "coupon"),
}


@pytest.mark.parametrize("wrong", INVALID)
def test_an_invalid_order_is_refused_with_the_field(
    client: Client, engine: Engine, wrong: str
) -> None:
    change, where = INVALID[wrong]
    answer = client.post("/orders", json={**ORDER, **change})
    assert answer.status_code == 422
    assert where in [problem["where"] for problem in answer.json()["problems"]]
    assert (stored(engine), events(engine)) == ([], 0)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"\x00"])
def test_what_is_no_json_is_refused(client: Client, body: bytes) -> None:
    answer = client.post("/orders", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_product_that_is_not_sold_is_refused(client: Client, engine: Engine) -> None:
    answer = client.post("/orders", json={**ORDER, "items": [{"sku": "unicorn", "quantity": 1}]})
    assert answer.status_code == 422
    assert answer.json() == {"error": "there is no product unicorn"}
    assert (stored(engine), events(engine)) == ([], 0)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/orders/00000000-0000-4000-8000-000000000000", 404),
        ("GET", "/orders/1", 404),
        ("GET", "/orders", 405),
        ("GET", "/", 404),
    ],
)
def test_what_is_not_there_is_said_as_json(
    client: Client, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert "error" in answer.json()


def test_an_order_that_cannot_be_stored_publishes_nothing(client: Client, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE order_item ADD CHECK (quantity < 2)"))
    assert client.post("/orders", json=ORDER).status_code == 500
    assert (stored(engine), events(engine)) == ([], 0)
