"""What a handler does to sagas beside its own, in the transaction of a batch that has not written all it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.events import Registry
from outbox.intake import Incoming
from outbox.receive import Receiver
from outbox.writing import encode
from saga import Participant, operating
from saga.operating import Operator


@dataclass(frozen=True)
class Ordered:
    order: str


@dataclass(frozen=True)
class Booked:
    order: str


@dataclass(frozen=True)
class Complained:
    """Its key sorts after every id of a saga, so a batch runs it last."""

    saga_id: UUID
    key: str = "~"
    in_savepoint: bool = False
    withdrawn: bool = False


@dataclass(frozen=True)
class Offered:
    offer: str


@dataclass(frozen=True)
class Expired:
    offer: str


@dataclass(frozen=True)
class Tempted:
    offer: str


class Bank:
    """One participant: a step that can be undone, and a handler that has sagas aborted."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = Registry()
        self.registry.event("bank.ordered", key="order")(Ordered)
        self.registry.event("bank.booked", key="order")(Booked)
        self.registry.event("bank.complained", key="key")(Complained)
        for kind in (Offered, Expired, Tempted):
            self.registry.event(f"bank.{kind.__name__.lower()}", key="offer")(kind)
        self.bank = Participant("bank", registry=self.registry)
        self.shop = Participant("shop", registry=self.registry)
        self.shop.starts(Ordered, nothing_to_undo="it is a test")
        self.undone: list[str] = []
        self._declare()

    def _declare(self) -> None:
        @self.bank.step(on=Ordered, emits=Booked)
        def book(ordered: Ordered, session: Session) -> Booked:
            return Booked(ordered.order)

        @book.compensation
        def cancel(ordered: Ordered, booked: Booked, session: Session) -> None:
            self.undone.append(ordered.order)

        @self.bank.on(Complained)
        def give_in(complained: Complained, session: Session) -> None:
            if complained.in_savepoint:
                with session.begin_nested() as savepoint:
                    self._abort(session, complained.saga_id)
                    if complained.withdrawn:
                        savepoint.rollback()
            else:
                self._abort(session, complained.saga_id)

        @self.bank.compensation(Offered)
        def withdraw(offered: Offered, session: Session) -> None: ...

        @self.bank.deadline(minutes=5, rejects=Expired)
        def expire(offered: Offered, session: Session) -> Expired:
            return Expired(offered.offer)

        @self.bank.on(Tempted)
        def resist(tempted: Tempted, session: Session) -> None:
            with session.begin_nested() as savepoint:
                self.bank.start(session, Offered(tempted.offer))
                savepoint.rollback()

    @staticmethod
    def _abort(session: Session, saga_id: UUID) -> None:
        operator = Operator("the bank", "a complaint")
        operating.abort(session, saga_id, operator, participant="bank", force=True)

    def start(self, order: str) -> tuple[UUID, Incoming]:
        with Session(self.engine) as session, session.begin():
            saga_id = self.shop.start(session, Ordered(order))
            body = session.execute(
                text("SELECT trigger FROM outbox.saga_step WHERE saga_id = :id"), {"id": saga_id}
            ).scalar_one()
        return saga_id, Incoming(bytes(body))

    def incoming(self, event: object) -> Incoming:
        return Incoming(encode(self.registry.of(event), event, source="customers").body)

    def take_in(self, *batch: Incoming) -> list[str]:
        receipts = Receiver(self.bank, self.engine).take_in_batch(batch)
        return [str(receipt) for receipt in receipts]

    def owed(self) -> list[Incoming]:
        rows = self.rows("SELECT handler, body FROM outbox.pending_delivery ORDER BY handler")
        return [Incoming(bytes(row.body), handler=row.handler) for row in rows]

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))


@pytest.fixture
def bank(migrated_engine: Engine) -> Bank:
    return Bank(migrated_engine)


@pytest.mark.parametrize("in_savepoint", [False, True])
def test_a_handler_that_aborts_a_saga_has_the_step_undone_that_ran_in_its_batch(
    bank: Bank, in_savepoint: bool
) -> None:
    saga_id, ordered = bank.start("1")
    _, another = bank.start("2")
    complained = bank.incoming(Complained(saga_id, in_savepoint=in_savepoint))

    assert bank.take_in(ordered, another, complained) == [
        "bank.book handled", "bank.book handled", "bank.give_in handled",
    ]  # fmt: skip

    assert [one.handler for one in bank.owed()] == ["bank.book.compensation"]
    bank.take_in(*bank.owed())
    assert bank.undone == ["1"]
    states = bank.rows("SELECT state FROM outbox.saga WHERE participant = 'bank' ORDER BY state")
    assert [row.state for row in states] == ["compensated", "running"]


def test_an_abort_that_a_savepoint_took_back_takes_no_step_of_the_batch_along(bank: Bank) -> None:
    saga_id, ordered = bank.start("1")
    _, another = bank.start("2")
    withdrawn = Complained(saga_id, in_savepoint=True, withdrawn=True)

    bank.take_in(ordered, another, bank.incoming(withdrawn))

    runs = bank.rows("SELECT state FROM outbox.saga_step WHERE participant = 'bank'")
    assert [row.state for row in runs] == ["done", "done"]
    assert bank.owed() == []


def test_a_saga_whose_start_a_savepoint_took_back_leaves_no_deadline(bank: Bank) -> None:
    _, ordered = bank.start("1")

    tempted = [bank.incoming(Tempted(offer)) for offer in "ab"]
    assert bank.take_in(ordered, *tempted) == [
        "bank.book handled", "bank.resist handled", "bank.resist handled",
    ]  # fmt: skip

    assert bank.owed() == []


def test_compensations_of_many_sagas_cost_as_many_statements_as_those_of_one(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = [bank.start(str(number)) for number in range(12)]
    bank.take_in(*(ordered for _, ordered in started))
    bank.take_in(*(bank.incoming(Complained(saga_id)) for saga_id, _ in started))
    owed = bank.owed()
    assert len(owed) == 12
    sent: list[str] = []
    real = psycopg.Cursor.execute

    def execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        sent.append(query.decode() if isinstance(query, bytes) else str(query))
        return real(self, query, *args, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", execute)
    bank.take_in(*owed[:2])
    for_two = len(sent)
    sent.clear()
    bank.take_in(*owed[2:])

    assert len(sent) == for_two
    assert sorted(bank.undone, key=int) == [str(number) for number in range(12)]
