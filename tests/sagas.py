"""An order saga for tests: a start, three steps in parallel, a join of two of their answers that can
be undone, and a join of all three that completes the saga.

Every step and every compensation leaves a row in the table `effect`, so that a test can see what is
there, what is there twice, and what came too late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.envelope import Envelope, decode
from outbox.events import Registry
from outbox.receive import ReceiveSettings
from outbox.service import RetryPolicy
from saga import Participant, Reject, current
from saga.participant import Unwinding
from saga.testing.choreography import Choreography, Message

TWICE = RetryPolicy(attempts=2, first=timedelta(0), cap=timedelta(0))
BRANCHES = ("inventory", "users", "shipping")


@dataclass(frozen=True)
class OrderCreated:
    order: str
    rejected_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class OrderConfirmed:
    order: str


@dataclass(frozen=True)
class StockReserved:
    order: str


@dataclass(frozen=True)
class StockRejected:
    order: str


@dataclass(frozen=True)
class PointsAdded:
    order: str


@dataclass(frozen=True)
class PointsRejected:
    order: str


@dataclass(frozen=True)
class ShipmentCreated:
    order: str


@dataclass(frozen=True)
class ShipmentRejected:
    order: str


_EVENTS = {
    "order.created": OrderCreated,
    "order.confirmed": OrderConfirmed,
    "stock.reserved": StockReserved,
    "stock.rejected": StockRejected,
    "points.added": PointsAdded,
    "points.rejected": PointsRejected,
    "shipment.created": ShipmentCreated,
    "shipment.rejected": ShipmentRejected,
}
_ANSWERS: dict[str, tuple[type[Any], type[Any]]] = {
    "inventory": (StockReserved, StockRejected),
    "users": (PointsAdded, PointsRejected),
    "shipping": (ShipmentCreated, ShipmentRejected),
}


class Broken(Exception):
    """What a step raises that is not a business answer."""


@dataclass
class Shop:
    """The four participants on one database, and what a test wants to know of them."""

    engine: Engine
    kind: type[Participant] = Participant
    settings: ReceiveSettings | None = None
    unwind: Unwinding = "reverse"
    failures: Counter[str] = field(default_factory=Counter)
    """How many more times each "actor.do" or "actor.undo" raises `Broken`. The actors are the
    participants, and "prepare" for the first join."""
    before: Callable[[str], None] = lambda _: None
    """Called with "actor.do" or "actor.undo" after it has written."""

    def __post_init__(self) -> None:
        self.registry = Registry()
        for name, cls in _EVENTS.items():
            self.registry.event(name, key="order")(cls)
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE TABLE IF NOT EXISTS effect (at bigint GENERATED ALWAYS AS IDENTITY, "
                    "saga_id uuid, actor text, what text)"
                )
            )
        self.order = self._participant("order")
        self._declare_order()
        self.branches = {name: self._branch(name) for name in BRANCHES}
        self.inventory, self.users, self.shipping = self.branches.values()
        self.participants = (self.order, *self.branches.values())
        self.reset()

    def reset(self) -> None:
        """Forget all messages, as at the beginning."""
        self.play = Choreography(
            dict.fromkeys(self.participants, self.engine), settings=self.settings
        )

    def start(self, *rejected_by: str, saga_id: UUID | None = None) -> UUID:
        """Place an order that the branches named will reject, and commit."""
        with Session(self.engine) as session, session.begin():
            created = OrderCreated("o1", rejected_by)
            saga_id = self.order.start(session, created, saga_id=saga_id)
            self._write(session, saga_id, "order.do")
        self.play.collect()
        return saga_id

    def message(self, type: str, participant: str) -> Message:
        """The first waiting message of that type to that participant."""
        return next(
            one
            for one in self.play.collect()
            if (one.type, one.service) == (type, participant) and one.handler is None
        )

    def deliver(self, type: str, participant: str) -> str:
        """Deliver the first waiting message of that type to that participant; what became of it."""
        return str(self.play.deliver(self.message(type, participant)))

    # ---- looking ----

    def effects(self, saga_id: UUID) -> list[str]:
        """What has been written for the saga, in the order of writing."""
        found = self.rows(
            "SELECT * FROM effect WHERE saga_id = :saga_id ORDER BY at", saga_id=saga_id
        )
        return [f"{row.actor}.{row.what}" for row in found]

    def states(self, saga_id: UUID) -> dict[str, str]:
        """Where the saga stands with each participant that knows it."""
        found = self.rows("SELECT * FROM outbox.saga WHERE saga_id = :saga_id", saga_id=saga_id)
        return {row.participant: row.state + (" stuck" if row.stuck else "") for row in found}

    def steps(self, saga_id: UUID) -> dict[str, str]:
        """Where each run stands, by "participant.step"."""
        found = self.rows(
            "SELECT * FROM outbox.saga_step WHERE saga_id = :saga_id", saga_id=saga_id
        )
        return {f"{row.participant}.{row.step}": row.state for row in found}

    def published(self, saga_id: UUID) -> Counter[str]:
        """How many events of each type the saga has published."""
        return Counter(one.type for one in self.log() if str(saga_id).encode() in one.body)

    def log(self) -> list[Envelope]:
        """Every event published by anyone, oldest first."""
        found = self.rows("SELECT body FROM outbox.outbox_event ORDER BY position")
        return [decode(bytes(row.body)) for row in found]

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))

    def run(self, sql: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(sql), values)

    # ---- the participants ----

    def _participant(self, name: str) -> Participant:
        return self.kind(
            name,
            registry=self.registry,
            retry=TWICE,
            compensation_retry=TWICE,
            unwind=self.unwind,
        )

    def _declare_order(self) -> None:
        @self.order.compensation(OrderCreated)
        def cancel(created: OrderCreated, session: Session) -> None:
            self._act(session, "order.undo")

        @self.order.join(StockReserved, PointsAdded)
        def prepare(stock: StockReserved, points: PointsAdded, session: Session) -> None:
            self._act(session, "prepare.do")

        @prepare.compensation
        def unprepare(stock: StockReserved, points: PointsAdded, session: Session) -> None:
            assert (type(stock), type(points)) == (StockReserved, PointsAdded)
            self._act(session, "prepare.undo")

        @self.order.join(
            StockReserved, PointsAdded, ShipmentCreated, emits=OrderConfirmed, completes=True
        )
        def confirm(
            stock: StockReserved, points: PointsAdded, shipment: ShipmentCreated, session: Session
        ) -> OrderConfirmed:
            self._act(session, "order.confirm")
            return OrderConfirmed(stock.order)

    def _branch(self, name: str) -> Participant:
        participant = self._participant(name)
        answer, rejection = _ANSWERS[name]

        @participant.step(on=OrderCreated, emits=answer, rejects=rejection, name="act")
        def act(created: OrderCreated, session: Session) -> Any:
            self._act(session, f"{name}.do")
            if name in created.rejected_by:
                raise Reject(rejection(created.order), reason=f"{name} says no")
            return answer(created.order)

        @act.compensation
        def undo(created: OrderCreated, answered: Any, session: Session) -> None:
            assert isinstance(answered, answer)
            self._act(session, f"{name}.undo")

        return participant

    def _act(self, session: Session, what: str) -> None:
        saga = current()
        assert saga is not None
        self._write(session, saga.saga_id, what)
        self.before(what)
        if self.failures[what] > 0:
            self.failures[what] -= 1
            raise Broken(f"{what} is broken")

    @staticmethod
    def _write(session: Session, saga_id: UUID, what: str) -> None:
        actor, _, verb = what.partition(".")
        session.execute(
            text("INSERT INTO effect (saga_id, actor, what) VALUES (:saga, :who, :what)"),
            {"saga": saga_id, "who": actor, "what": verb},
        )


_CAUSES = (
    *(("order.undo", f"{name}.undo") for name in BRANCHES),
    ("inventory.undo", "prepare.undo"),
    ("users.undo", "prepare.undo"),
)
"""What was caused is undone before its cause."""


def check_whole(shop: Shop, saga_id: UUID) -> str:
    """How the saga ended. Raises `AssertionError` if it is not whole: completed with every effect
    there once, or compensated with every effect undone once and none after that."""
    states = shop.states(saga_id)
    assert set(states) == {"order", *BRANCHES}, f"not heard of everywhere: {states}"
    assert len(set(states.values())) == 1, f"ended in more than one way: {states}"
    (end,) = set(states.values())
    by_actor: dict[str, list[str]] = {name: [] for name in ("order", "prepare", *BRANCHES)}
    for effect in shop.effects(saga_id):
        actor, _, what = effect.partition(".")
        by_actor[actor].append(what)
    for actor, effects in by_actor.items():
        if end == "completed":
            expected = [["do", "confirm"]] if actor == "order" else [["do"]]
        else:
            assert end == "compensated", f"not at its end: {states}"
            expected = [["do", "undo"], *([] if actor == "order" else [[]])]
        assert effects in expected, f"{end}, but {actor} has {effects}"
    if shop.unwind == "reverse":
        undone = [one for one in shop.effects(saga_id) if one.endswith(".undo")]
        for cause, effect in _CAUSES:
            if cause in undone and effect in undone:
                assert undone.index(effect) < undone.index(cause), f"out of order: {undone}"
    return end
