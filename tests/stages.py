"""What documented commands are about: databases where something has happened, by the names that the documents use."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import outbox
from outbox import dead_letters, pending, quarantine, subscriptions
from outbox.buses.base import OutgoingMessage
from outbox.events import Registry
from outbox.ids import new_id
from outbox.receive import Receiver
from outbox.relay import Relay, RelaySettings
from outbox.service import Service
from saga import Participant, Unknown, operating
from saga.testing.choreography import Choreography
from tests.losing import Wire
from tests.sagas import TWICE
from tests.workers import eventually

SAGA_ID: Final = UUID("01234567-89ab-7cde-8f01-23456789abcd")

SHOP: Final = """
from dataclasses import dataclass
from outbox import Service, event

@event("order.created", key="order_id")
@dataclass
class OrderCreated: order_id: int

billing = Service("billing")

@billing.on(OrderCreated)
def write_invoice(order: OrderCreated, session: object) -> None: ...
"""
BILLING: Final = """
import os
from celery import Celery
from outbox.celery import setup
from shop import billing

app = Celery("billing", broker=os.environ["OUTBOX_BROKER_URL"])
setup(app, billing, database_url=os.environ["OUTBOX_DATABASE_URL"])
"""
"""Its settings from where the commands have theirs; an app of a user has its own."""


@dataclass(frozen=True)
class Scene:
    """A source, and a subscriber that is also where sagas are; each has all tables, and nothing in them."""

    source: Engine
    subscriber: Engine


def nothing(scene: Scene) -> None: ...


def anything(scene: Scene) -> bool:
    return True


def no_tables(scene: Scene) -> None:
    run(scene.subscriber, "DROP SCHEMA outbox CASCADE")


def exists(engine: Engine, sql: str) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(text(f"SELECT EXISTS ({sql})")))


def run(engine: Engine, sql: str, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(text(sql), values)


registry = Registry()


@registry.event("order.created", key="order_id")
@dataclass(frozen=True)
class OrderCreated:
    order_id: int


@registry.event("stock.reserved", key="order_id")
@dataclass(frozen=True)
class StockReserved:
    order_id: int


@registry.event("card.charged", key="order_id")
@dataclass(frozen=True)
class CardCharged:
    order_id: int


# ---- events ----


def three_events_not_yet_sent(scene: Scene) -> None:
    with Session(scene.source) as session, session.begin():
        outbox.publish_all(session, map(OrderCreated, range(3)), registry=registry)


def has_tables(scene: Scene) -> bool:
    return exists(scene.subscriber, "SELECT FROM pg_tables WHERE tablename = 'outbox_event'")


def are_sent(scene: Scene) -> bool:
    """A cursor has passed an event; all three are of one page."""
    return exists(scene.source, "SELECT FROM outbox.outbox_cursor WHERE hi > 0")


def is_subscribed(scene: Scene) -> bool:
    """A worker of billing runs."""
    return exists(scene.subscriber, "SELECT FROM outbox.outbox_worker WHERE service = 'billing'")


def three_events(scene: Scene, *, lost: int = 0) -> None:
    """Sent two minutes ago, so that none is on its way any more."""
    billing = Service("billing", registry=registry)
    billing.on(OrderCreated, name="billing.write_invoice")(lambda order, session: None)
    receiver = Receiver(billing, scene.subscriber)
    with Session(scene.subscriber) as session, session.begin():
        subscriptions.note(session, billing)
    three_events_not_yet_sent(scene)
    seen: list[OutgoingMessage] = []

    def hand(message: OutgoingMessage) -> None:
        seen.append(message)
        if len(seen) > lost:
            receiver.receive(message.body)

    relay = Relay(scene.source.url, Wire(hand), settings=RelaySettings(rolls=None))
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        eventually(lambda: relay.stats.confirmed == 3)
    finally:
        relay.stop()
        thread.join(30)
    run(scene.source, "UPDATE outbox.outbox_cursor SET stored_at = stored_at - interval '2 min'")


def three_events_one_of_which_was_lost(scene: Scene) -> None:
    three_events(scene, lost=1)


def a_restored_log(scene: Scene) -> None:
    """From a cluster with the number 1."""
    run(scene.source, "INSERT INTO outbox.outbox_cluster (system_identifier) VALUES (1)")


def a_dead_letter(scene: Scene) -> None:
    """Number 17, of key 4711."""
    run(scene.subscriber, "ALTER TABLE outbox.dead_letter ALTER COLUMN id RESTART WITH 17")
    owed = pending.Owed(
        "billing", "billing.write_invoice", new_id(), "order.created", b"{}", key="4711"
    )
    with Session(scene.subscriber) as session, session.begin():
        dead_letters.park(session, owed, 8, "CardDeclined: no funds", "its traceback")


def a_quarantined_message(scene: Scene) -> None:
    """Number 3."""
    run(scene.subscriber, "ALTER TABLE outbox.quarantine ALTER COLUMN id RESTART WITH 3")
    with Session(scene.subscriber) as session, session.begin():
        quarantine.put(session, "billing", b"{}", "no envelope")


def a_hole_that_is_gone(scene: Scene) -> None:
    run(
        scene.subscriber,
        """
        INSERT INTO outbox.awaited
            (handler, event_id, service, type, log, lane, position, asks, next_ask_at, gone_at)
        VALUES ('billing.write_invoice', :id, 'billing', 'order.created', gen_random_uuid(), 0, 1, 3,
            clock_timestamp(), clock_timestamp())
        """,
        id=new_id(),
    )


# ---- a saga ----


class Trade:
    """An order with its stock and its payment, and a shipping that nobody waits for, in one database."""

    def __init__(self, engine: Engine, *failing: str) -> None:
        self._engine, self._failing = engine, failing
        names = ("orders", "inventory", "payments", "shipping")
        self._participants = [self._participant(name) for name in names]
        self._declare(*self._participants)
        self.play = Choreography(dict.fromkeys(self._participants, engine))
        with Session(engine) as session, session.begin():
            self._participants[0].start(session, OrderCreated(1), saga_id=SAGA_ID)

    def abort(self) -> None:
        with Session(self._engine) as session, session.begin():
            operating.abort(session, SAGA_ID, operating.Operator("ana", "the customer called"))

    def _participant(self, name: str) -> Participant:
        return Participant(name, registry=registry, retry=TWICE, compensation_retry=TWICE)

    def _declare(
        self,
        orders: Participant,
        inventory: Participant,
        payments: Participant,
        shipping: Participant,
    ) -> None:
        orders.starts(OrderCreated, nothing_to_undo="a test")

        @orders.join(StockReserved, CardCharged, completes=True)
        def confirm(stock: StockReserved, card: CardCharged, session: Session) -> None: ...

        @inventory.step(on=OrderCreated, emits=StockReserved)
        def reserve_stock(order: OrderCreated, session: Session) -> StockReserved:
            self._fail("reserve_stock")
            return StockReserved(order.order_id)

        @reserve_stock.compensation
        def release_stock(order: OrderCreated, stock: StockReserved, session: Session) -> None:
            self._fail("release_stock")

        @payments.step(on=OrderCreated, emits=CardCharged, external=True)
        def charge(order: OrderCreated) -> CardCharged:
            self._fail("charge")
            return CardCharged(order.order_id)

        @charge.resolve
        def look_up(order: OrderCreated) -> CardCharged | None:
            raise Unknown("the bank does not say")

        @charge.compensation
        def refund(order: OrderCreated, card: CardCharged, session: Session) -> None: ...

        @shipping.step(on=OrderCreated, nothing_to_undo="a test")
        def prepare(order: OrderCreated, session: Session) -> None: ...

    def _fail(self, step: str) -> None:
        if step in self._failing:
            raise ConnectionError(f"{step} fails")


def a_saga(scene: Scene) -> None:
    """That has begun."""
    Trade(scene.subscriber)


def a_stuck_step(scene: Scene) -> None:
    Trade(scene.subscriber, "reserve_stock").play.settle()


def an_unresolved_charge(scene: Scene) -> None:
    Trade(scene.subscriber, "charge").play.settle()


def a_stuck_compensation(scene: Scene) -> None:
    trade = Trade(scene.subscriber, "release_stock", "charge")
    trade.play.settle()
    trade.abort()
    trade.play.settle()
