"""The shop's door: `POST /orders` answers as soon as the order is stored; the rest happens behind it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Any, Self
from uuid import UUID, uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.order_saga.order.models import Order
from examples.order_saga.order.service import UnknownProducts, place_order
from outbox import wake_relays
from saga import AlreadyStarted

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w-]+$")]


class OrderedItem(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sku: Name
    quantity: int = Field(ge=1, le=1000)


class NewOrder(BaseModel):
    """The body of `POST /orders`."""

    model_config = ConfigDict(extra="forbid")

    customer_id: Name
    country: str = Field(pattern="^[A-Z]{2}$")
    items: list[OrderedItem] = Field(min_length=1, max_length=50)

    @model_validator(mode="after")
    def each_product_once(self) -> Self:
        if len({item.sku for item in self.items}) < len(self.items):
            raise ValueError("each product may be named once")
        return self


def create_app(engine: Engine | None = None) -> Starlette:
    """The application, on *engine* or on the database that the environment names."""
    database = engine or create_engine(
        make_url(os.environ["OUTBOX_DATABASE_URL"]).set(drivername="postgresql+psycopg")
    )
    wake_relays(database)

    async def post_order(request: Request) -> JSONResponse:
        order_id = given_id(request) or uuid4()
        new = NewOrder.model_validate_json(await request.body())
        await run_in_threadpool(store, order_id, new)
        where = str(request.app.url_path_for("order", order_id=order_id))
        return JSONResponse(
            {"id": str(order_id), "status": "created"}, 202, headers={"Location": where}
        )

    def store(order_id: UUID, new: NewOrder) -> None:
        with suppress(AlreadyStarted), Session(database) as session, session.begin():
            place_order(
                session,
                order_id=order_id,
                customer_id=new.customer_id,
                country=new.country,
                quantities={item.sku: item.quantity for item in new.items},
            )

    def get_order(request: Request) -> JSONResponse:
        with Session(database) as session:
            found = session.get(Order, request.path_params["order_id"])
            if found is None:
                raise HTTPException(404, "there is no such order")
            return JSONResponse(described(found))

    return Starlette(
        routes=[
            Route("/orders", post_order, methods=["POST"]),
            Route("/orders/{order_id:uuid}", get_order, name="order"),
        ],
        exception_handlers={
            ValidationError: refuse_body,
            UnknownProducts: refuse_products,
            HTTPException: refuse,
        },
    )


def given_id(request: Request) -> UUID | None:
    """The order's id, where the client chose one: so that it can ask again without ordering again."""
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return None
    try:
        return UUID(given)
    except ValueError:
        raise HTTPException(400, "the Idempotency-Key must be a UUID") from None


def described(order: Order) -> dict[str, Any]:
    return {
        "id": str(order.id),
        "status": order.status,
        "reason": order.reason,
        "tracking_number": order.tracking_number,
        "customer_id": order.customer_id,
        "country": order.country,
        "total_cents": order.total_cents,
        "items": [{"sku": item.sku, "quantity": item.quantity} for item in order.items],
        "created_at": order.created_at.isoformat(),
        "settled_at": order.settled_at and order.settled_at.isoformat(),
    }


def refuse_body(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ValidationError)
    problems = [
        {"where": ".".join(map(str, problem["loc"])), "problem": problem["msg"]}
        for problem in error.errors()
    ]
    is_json = all(problem["type"] != "json_invalid" for problem in error.errors())
    return JSONResponse(
        {"error": "the order is not valid", "problems": problems}, 422 if is_json else 400
    )


def refuse_products(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 422)


def refuse(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
