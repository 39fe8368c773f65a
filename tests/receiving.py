"""What the tests of receiving share: a service on a database, and messages for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.envelope import Envelope
from outbox.events import Registry
from outbox.receive import Receipt, Receiver, ReceiveSettings
from outbox.service import RetryPolicy, Service
from outbox.transactions import NotSettled
from outbox.writing import encode

AT_ONCE = RetryPolicy(attempts=3, first=timedelta(0), cap=timedelta(0))
PATIENT = ReceiveSettings(patience=timedelta(seconds=20))

__all__ = ["AT_ONCE", "PATIENT", "NotSettled", "Subscriber"]


class Placed(BaseModel):
    order: str
    total: int = 1


@dataclass
class Subscriber:
    """One service with its database, where handlers write into the table `effect`."""

    engine: Engine
    registry: Registry = field(default_factory=Registry)
    settings: ReceiveSettings = PATIENT
    service: Service = field(init=False)

    def __post_init__(self) -> None:
        self.registry.event("order.placed", key="order")(Placed)
        self.service = Service("billing", registry=self.registry, retry=AT_ONCE)
        self.run("CREATE TABLE IF NOT EXISTS effect (handler text, what text)")

    def receiver(self, **options: Any) -> Receiver:
        options.setdefault("settings", self.settings)
        options.setdefault("random", Random(1))
        engine = options.pop("engine", self.engine)
        return Receiver(self.service, engine, **options)

    def receive(self, envelope: Envelope | bytes, **options: Any) -> Receipt:
        """Receive with a receiver of its own."""
        body = envelope if isinstance(envelope, bytes) else envelope.body
        return self.receiver().receive(body, **options)

    def placed(self, order: str = "o1", **attributes: Any) -> Envelope:
        return self.envelope(Placed(order=order), **attributes)

    def envelope(self, event: object, **attributes: Any) -> Envelope:
        return encode(self.registry.of(event), event, source="orders", **attributes)

    def write(self, what: str, handler: str = "billing.bill") -> Callable[[Any, Session], None]:
        """A handler that writes one effect."""

        def bill(event: Any, session: Session) -> None:
            self.effect(session, what, handler)

        return bill

    @staticmethod
    def effect(session: Session, what: str, handler: str = "billing.bill") -> None:
        session.execute(
            text("INSERT INTO effect VALUES (:handler, :what)"), {"handler": handler, "what": what}
        )

    # ---- looking ----

    @property
    def effects(self) -> list[str]:
        return [row.what for row in self.rows("SELECT what FROM effect ORDER BY what")]

    @property
    def owed(self) -> list[Any]:
        return self.rows("SELECT * FROM outbox.pending_delivery ORDER BY handler, next_attempt_at")

    @property
    def dead(self) -> list[Any]:
        return self.rows("SELECT * FROM outbox.dead_letter ORDER BY id")

    @property
    def quarantined(self) -> list[Any]:
        return self.rows("SELECT * FROM outbox.quarantine ORDER BY id")

    @property
    def inbox(self) -> list[tuple[UUID, str]]:
        return [(r.event_id, r.handler) for r in self.rows("SELECT * FROM outbox.inbox")]

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))

    def run(self, sql: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(sql), values)

    def session(self) -> Session:
        return Session(self.engine)


def now() -> datetime:
    return datetime.now(UTC)
