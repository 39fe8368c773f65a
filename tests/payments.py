"""A saga whose payment is charged by a bank in a database of its own, where no transaction reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.events import Registry
from saga import Participant, Reject, Unknown, current
from saga.testing.choreography import Choreography, Message
from tests.sagas import TWICE


class Killed(BaseException):
    """Stands for the death of the worker in the middle of something."""


@dataclass(frozen=True)
class Ordered:
    order: str
    is_out_of_stock: bool = False
    is_declined: bool = False


@dataclass(frozen=True)
class Paid:
    order: str
    reference: str


@dataclass(frozen=True)
class Declined:
    order: str


@dataclass(frozen=True)
class Stocked:
    order: str


@dataclass(frozen=True)
class OutOfStock:
    order: str


def _nothing(_where: str) -> None: ...


@dataclass
class Bank:
    """Charges once per idempotency key, as banks do, and counts how often it was asked."""

    engine: Engine
    declines: bool = False
    at: Callable[[str], None] = _nothing
    """Called "before charge", "after charge", "before resolve", with the power to raise."""

    def __post_init__(self) -> None:
        self._run(
            "CREATE TABLE IF NOT EXISTS charge (key text PRIMARY KEY, calls int NOT NULL DEFAULT 1, "
            "refunds int NOT NULL DEFAULT 0)"
        )

    def charge(self, key: str) -> str | None:
        self.at("before charge")
        if self.declines:
            return None
        self._run(
            "INSERT INTO charge (key) VALUES (:key) ON CONFLICT (key) "
            "DO UPDATE SET calls = charge.calls + 1",
            key=key,
        )
        self.at("after charge")
        return f"ref {key}"

    def find(self, key: str) -> str | None:
        self.at("before resolve")
        return (
            f"ref {key}" if self._rows("SELECT 1 FROM charge WHERE key = :key", key=key) else None
        )

    def refund(self, key: str) -> None:
        self._run("UPDATE charge SET refunds = refunds + 1 WHERE key = :key", key=key)

    def charges(self, saga_id: UUID) -> list[tuple[int, int]]:
        """(calls, refunds) of each charge that was made for the saga."""
        rows = self._rows(
            "SELECT calls, refunds FROM charge WHERE key LIKE :prefix", prefix=f"{saga_id}/%"
        )
        return [(row.calls, row.refunds) for row in rows]

    def _run(self, sql: str, **values: object) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(sql), values)

    def _rows(self, sql: str, **values: object) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))


@dataclass
class Payments:
    """The participants: shop decides, payments charges, stock may say no."""

    engine: Engine
    bank: Bank
    has_resolve: bool = True
    is_external: bool = True
    kind: type[Participant] = Participant
    registry: Registry = field(default_factory=Registry)

    def __post_init__(self) -> None:
        for name, cls in {
            "order.ordered": Ordered, "order.paid": Paid, "order.declined": Declined,
            "order.stocked": Stocked, "order.out_of_stock": OutOfStock,
        }.items():  # fmt: skip
            self.registry.event(name, key="order")(cls)
        self.run("CREATE TABLE IF NOT EXISTS payment (saga_id uuid, reference text)")
        self.shop = self._participant("shop")
        self.payments = self._participant("payments")
        self.stock = self._participant("stock")
        self._declare()
        self.reset()

    def reset(self) -> None:
        services = dict.fromkeys((self.shop, self.payments, self.stock), self.engine)
        self.play = Choreography(services)

    def start(self, *, is_out_of_stock: bool = False) -> UUID:
        with Session(self.engine) as session, session.begin():
            saga_id = self.shop.start(session, Ordered("o1", is_out_of_stock))
        self.play.collect()
        return saga_id

    def message(self, type: str, participant: str) -> Message:
        return next(
            one
            for one in self.play.collect()
            if (one.type, one.service) == (type, participant) and one.handler is None
        )

    def deliver(self, type: str, participant: str) -> str:
        return str(self.play.deliver(self.message(type, participant)))

    def step(self, saga_id: UUID) -> str | None:
        rows = self.rows(
            "SELECT state FROM outbox.saga_step WHERE saga_id = :id AND step = 'charge'", id=saga_id
        )
        return rows[0].state if rows else None

    def states(self, saga_id: UUID) -> dict[str, str]:
        rows = self.rows("SELECT * FROM outbox.saga WHERE saga_id = :id", id=saga_id)
        return {row.participant: row.state + (" stuck" if row.stuck else "") for row in rows}

    def check_whole(self, saga_id: UUID) -> str:
        """How it ended. Raises `AssertionError` unless the bank and the books say the same."""
        ends = set(self.states(saga_id).values())
        assert len(ends) == 1, self.states(saga_id)
        (end,) = ends
        charges = self.bank.charges(saga_id)
        booked = self.rows("SELECT * FROM payment WHERE saga_id = :id", id=saga_id)
        if end == "completed":
            assert [refunds for _, refunds in charges] == [0]
            assert len(booked) == 1
        else:
            assert end == "compensated"
            assert [refunds for _, refunds in charges] in ([], [1])
            assert booked == []
        return end

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))

    def run(self, sql: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(sql), values)

    def _participant(self, name: str) -> Participant:
        return self.kind(name, registry=self.registry, retry=TWICE, compensation_retry=TWICE)

    def _declare(self) -> None:
        self.shop.starts(Ordered, nothing_to_undo="a test")

        @self.shop.join(Paid, Stocked, completes=True)
        def ship(paid: Paid, stocked: Stocked, session: Session) -> None: ...

        @self.stock.step(on=Ordered, emits=Stocked, rejects=OutOfStock, nothing_to_undo="a test")
        def reserve(ordered: Ordered, session: Session) -> Stocked:
            if ordered.is_out_of_stock:
                raise Reject(OutOfStock(ordered.order))
            return Stocked(ordered.order)

        if not self.is_external:

            @self.payments.step(on=Ordered, emits=Paid, name="charge", nothing_to_undo="a test")
            def charge_no_more(ordered: Ordered, session: Session) -> Paid:
                raise AssertionError("called")

            return

        @self.payments.step(on=Ordered, emits=Paid, rejects=Declined, external=True)
        def charge(ordered: Ordered) -> Paid:
            reference = self.bank.charge(_key())
            if reference is None:
                raise Reject(Declined(ordered.order))
            return Paid(ordered.order, reference)

        @charge.record
        def book(ordered: Ordered, paid: Paid, session: Session) -> None:
            session.execute(
                text("INSERT INTO payment VALUES (:saga, :reference)"),
                {"saga": _saga_id(), "reference": paid.reference},
            )

        @charge.compensation
        def refund(ordered: Ordered, paid: Paid, session: Session) -> None:
            self.bank.refund(paid.reference.removeprefix("ref "))
            deleted = session.execute(
                text("DELETE FROM payment WHERE saga_id = :saga RETURNING 1"), {"saga": _saga_id()}
            )
            assert deleted.all(), "nothing was booked"

        if not self.has_resolve:
            return

        @charge.resolve
        def look_up(ordered: Ordered) -> Paid | None:
            reference = self.bank.find(_key())
            return None if reference is None else Paid(ordered.order, reference)


def unknown(where: str) -> None:
    """A bank that does not answer questions."""
    if where == "before resolve":
        raise Unknown("the bank does not say")


def _key() -> str:
    saga = current()
    assert saga is not None
    return saga.idempotency_key


def _saga_id() -> UUID:
    saga = current()
    assert saga is not None
    return saga.saga_id
