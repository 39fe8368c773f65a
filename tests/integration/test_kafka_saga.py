"""A saga whose participants hear of each other through Kafka, each with a relay, a consumer and a database."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.buses.kafka import KafkaBus
from outbox.events import Registry
from outbox.kafka import Consumer, ConsumerSettings
from outbox.relay import Relay
from saga import Participant, Reject
from tests.kafka_brokers import LocalKafka
from tests.mock_kafka import MockKafka
from tests.workers import eventually

TOPICS = ("events.order", "events.stock", "events.saga", "orders.events", "inventory.events")
registry = Registry()


@registry.event("order.created", key="order")
@dataclass(frozen=True)
class OrderCreated:
    order: str
    cents: int


@registry.event("order.confirmed", key="order")
@dataclass(frozen=True)
class OrderConfirmed:
    order: str


@registry.event("stock.reserved", key="order")
@dataclass(frozen=True)
class StockReserved:
    order: str


@registry.event("stock.rejected", key="order")
@dataclass(frozen=True)
class StockRejected:
    order: str


orders = Participant("orders", registry=registry)
inventory = Participant("inventory", registry=registry)


@inventory.step(on=OrderCreated, emits=StockReserved, rejects=StockRejected)
def reserve(event: OrderCreated, session: Session) -> StockReserved:
    write(session, f"{event.order} reserved")
    if event.cents > 100:
        raise Reject(StockRejected(order=event.order))
    return StockReserved(order=event.order)


@reserve.compensation
def release(event: OrderCreated, reserved: StockReserved, session: Session) -> None:
    write(session, f"{event.order} released")


@orders.compensation(OrderCreated)
def cancel(event: OrderCreated, session: Session) -> None:
    write(session, f"{event.order} cancelled")


@orders.join(StockReserved, emits=OrderConfirmed, completes=True)
def confirm(event: StockReserved, session: Session) -> OrderConfirmed:
    write(session, f"{event.order} confirmed")
    return OrderConfirmed(order=event.order)


def write(session: Session, what: str) -> None:
    session.execute(text("INSERT INTO effect VALUES (:what)"), {"what": what})


def effects(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.scalars(text("SELECT what FROM effect")))


@contextmanager
def running(participant: Participant, engine: Engine, url: str) -> Iterator[None]:
    parts: list[Any] = [
        Relay(engine.url, KafkaBus(url, participant.exchange)),
        Consumer(
            participant, url, database_url=engine.url, consuming=ConsumerSettings(2, batch=10)
        ),
    ]
    threads = [threading.Thread(target=part.run) for part in parts]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for part in parts:
            part.stop()
        for thread in threads:
            thread.join(30)


@pytest.fixture(params=["mock", "broker"])
def url(request: pytest.FixtureRequest) -> str:
    """A Kafka of the test's own, as participants have fixed names. The mock's topics are made by hand."""
    if request.param == "mock":
        mock: MockKafka = request.getfixturevalue("mock_kafka")
        for topic in TOPICS:
            mock.create_topic(topic, 4)
        return mock.url
    broker: LocalKafka = request.getfixturevalue("private_kafka")
    return f"{broker.url}&session.timeout.ms=2500&heartbeat.interval.ms=500"


def test_sagas_over_kafka_end_completed_or_undone(
    url: str,
    make_migrated_database: Callable[[], str],
    make_engine: Callable[..., Engine],
) -> None:
    engines = {one: make_engine(make_migrated_database()) for one in (orders, inventory)}
    for engine in engines.values():
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE effect (what text)"))
    with ExitStack() as stack:
        for participant, engine in engines.items():
            stack.enter_context(running(participant, engine, url))
        for number in range(20):
            with Session(engines[orders]) as session, session.begin():
                orders.start(session, OrderCreated(f"o{number}", 200 if number % 2 else 50))
        expected = {f"o{n} {'cancelled' if n % 2 else 'confirmed'}" for n in range(20)}
        eventually(
            lambda: effects(engines[orders]) >= expected, 60, lambda: effects(engines[orders])
        )
    assert effects(engines[orders]) == expected
    assert effects(engines[inventory]) == {f"o{n} reserved" for n in range(0, 20, 2)}
