"""Countermeasures to lack of isolation: rows that are pending for a saga, and values that are read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox.events import Registry
from saga import Participant, Reject
from saga.errors import Changed, Held, OutsideSaga
from saga.isolation import Otherwise, SemanticLock, reread
from saga.testing.choreography import Choreography
from tests.overlapping import StoppingParticipant, overlap
from tests.sagas import TWICE


@dataclass(frozen=True)
class Booked:
    seat: int


@dataclass(frozen=True)
class Taken:
    seat: int


@dataclass(frozen=True)
class Gone:
    seat: int


@dataclass(frozen=True)
class Paid:
    seat: int


@dataclass(frozen=True)
class Unpaid:
    seat: int


class Base(DeclarativeBase): ...


class Seat(Base):
    __tablename__ = "seat"

    number: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int] = mapped_column(default=10)
    guest: Mapped[str | None]
    pending_saga: Mapped[UUID | None]


class Theatre:
    """The desk starts and decides; the theatre has the seats; the till may say no."""

    def __init__(self, engine: Engine, otherwise: Otherwise = "fail") -> None:
        self.engine = engine
        self.otherwise = otherwise
        self.has_money = True
        registry = Registry()
        for cls in (Booked, Taken, Gone, Paid, Unpaid):
            registry.event(f"seat.{cls.__name__.lower()}", key="seat")(cls)
        self.desk, self.theatre, self.till = (
            StoppingParticipant(name, registry=registry, retry=TWICE)
            for name in ("desk", "theatre", "till")
        )
        self.seats = SemanticLock(self.theatre, Seat.pending_saga)
        self._declare()
        participants: tuple[Participant, ...] = (self.desk, self.theatre, self.till)
        self.play = Choreography(dict.fromkeys(participants, engine))

    def book(self, seat: int = 1) -> UUID:
        with Session(self.engine) as session, session.begin():
            saga_id = self.desk.start(session, Booked(seat))
        self.play.collect()
        return saga_id

    def deliver(self, type: str, participant: str, saga_id: UUID) -> str:
        return str(self.play.deliver(self.message(type, participant, saga_id)))

    def message(self, type: str, participant: str, saga_id: UUID) -> Any:
        return next(
            one
            for one in self.play.collect()
            if (one.type, one.service) == (type, participant) and str(saga_id).encode() in one.body
        )

    def state(self, saga_id: UUID) -> str:
        with self.engine.connect() as connection:
            rows = connection.execute(
                text("SELECT state FROM outbox.saga WHERE saga_id = :id AND participant = 'desk'"),
                {"id": saga_id},
            )
            return str(rows.scalar_one())

    @property
    def free(self) -> set[int]:
        with Session(self.engine) as session:
            return set(session.scalars(select(Seat.number).where(self.seats.is_free())))

    @property
    def pending(self) -> set[int]:
        with Session(self.engine) as session:
            return set(session.scalars(select(Seat.number).where(self.seats.is_pending())))

    def _declare(self) -> None:
        self.desk.starts(Booked, nothing_to_undo="a test")

        @self.desk.join(Taken, Paid, completes=True)
        def confirm(taken: Taken, paid: Paid, session: Session) -> None: ...

        @self.theatre.step(on=Booked, emits=Taken, rejects=Gone)
        def take(booked: Booked, session: Session) -> Taken:
            try:
                (seat,) = self.seats.take(
                    session, Seat.number == booked.seat, otherwise=self.otherwise
                )
            except Held as held:
                raise Reject(Gone(booked.seat)) from held
            if seat.guest is not None:
                raise Reject(Gone(booked.seat))
            seat.guest = str(self.seats.holder())
            return Taken(booked.seat)

        @take.compensation
        def give_back(booked: Booked, taken: Taken, session: Session) -> None:
            session.get_one(Seat, booked.seat).guest = None

        @self.till.step(on=Booked, emits=Paid, rejects=Unpaid, nothing_to_undo="a test")
        def pay(booked: Booked, session: Session) -> Paid:
            if not self.has_money:
                raise Reject(Unpaid(booked.seat))
            return Paid(booked.seat)


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    Base.metadata.create_all(shared_engine)
    return shared_engine


@pytest.fixture
def theatre(engine: Engine) -> Theatre:
    with Session(engine) as session, session.begin():
        session.execute(Seat.__table__.delete())  # type: ignore[attr-defined]
        session.execute(text("DELETE FROM outbox.pending_delivery"))
        session.add_all(Seat(number=number) for number in (1, 2))
    return Theatre(engine)


def test_a_row_is_pending_from_the_step_to_the_commit_that_completes_the_saga_there(
    theatre: Theatre,
) -> None:
    theatre.book()
    seen: list[frozenset[int]] = []

    def watch(waiting: Any) -> Any:
        seen.append(frozenset(theatre.pending))
        return waiting[0]

    theatre.play.settle(watch)
    assert seen[0] == frozenset()
    assert frozenset({1}) in seen
    assert (theatre.pending, theatre.free) == (set(), {1, 2})


def test_a_row_is_free_again_once_its_saga_is_undone(theatre: Theatre) -> None:
    theatre.has_money = False
    saga_id = theatre.book()
    theatre.deliver("seat.booked", "theatre", saga_id)
    assert (theatre.pending, theatre.free) == ({1}, {2})
    theatre.play.settle()
    assert theatre.state(saga_id) == "compensated"
    assert theatre.free == {1, 2}


def test_who_fails_on_a_pending_row_can_reject_and_the_holder_is_named(theatre: Theatre) -> None:
    first, second = theatre.book(), theatre.book()
    theatre.deliver("seat.booked", "theatre", first)
    theatre.deliver("seat.booked", "theatre", second)
    with Session(theatre.engine) as session, pytest.raises(Held) as caught:
        theatre.seats.check(session, Seat.number == 1)
    assert caught.value.saga_id == first
    theatre.play.settle()
    assert (theatre.state(first), theatre.state(second)) == ("completed", "compensated")


def test_who_waits_for_a_pending_row_uses_up_no_attempt_and_has_it_after_the_undoing(
    theatre: Theatre,
) -> None:
    theatre.otherwise = "wait"
    first, second = theatre.book(), theatre.book()
    theatre.deliver("seat.booked", "theatre", first)
    for _ in range(3):
        assert theatre.deliver("seat.booked", "theatre", second) == "theatre.take busy"
    theatre.has_money = False
    theatre.deliver("seat.booked", "till", first)
    theatre.has_money = True
    theatre.play.settle()
    assert (theatre.state(first), theatre.state(second)) == ("compensated", "completed")


@pytest.mark.parametrize("after", ["lock", "record"])
def test_of_two_sagas_at_once_one_has_the_row(theatre: Theatre, after: str) -> None:
    first, second = theatre.book(), theatre.book()
    one, two = (theatre.message("seat.booked", "theatre", each) for each in (first, second))
    overlap(
        theatre.engine,
        lambda: theatre.play.deliver(one),
        lambda: theatre.play.deliver(two),
        after=after,
    )
    theatre.play.settle()
    assert sorted((theatre.state(first), theatre.state(second))) == ["compensated", "completed"]


def test_the_caller_of_start_marks_rows_for_the_saga_it_starts(theatre: Theatre) -> None:
    counter = SemanticLock(theatre.desk, Seat.pending_saga)
    with Session(theatre.engine) as session, session.begin():
        saga_id = theatre.desk.start(session, Booked(2))
        counter.take(session, Seat.number == 2, saga_id=saga_id)
    with Session(theatre.engine) as session, pytest.raises(Held):
        counter.check(session, Seat.number == 2)
    with Session(theatre.engine) as session:
        counter.check(session, Seat.number == 1)
        with pytest.raises(OutsideSaga, match="can be pending only for a saga of desk"):
            counter.take(session, Seat.number == 1)


def test_a_value_that_was_read_before_is_read_again(theatre: Theatre) -> None:
    with Session(theatre.engine) as session, session.begin():
        reread(session, Seat.number == 1, unchanged={Seat.price: 10, Seat.guest: None})
        with pytest.raises(Changed, match="price was 9 and is 10"):
            reread(session, Seat.number == 1, unchanged={Seat.price: 9})
        with pytest.raises(Changed, match="the row of Seat that was read before is gone"):
            reread(session, Seat.number == 3, unchanged={Seat.price: 10})


def test_what_was_reread_stays_until_the_end_of_the_transaction(theatre: Theatre) -> None:
    with Session(theatre.engine) as session, session.begin():
        reread(session, Seat.number == 1, unchanged={Seat.price: 10})
        with theatre.engine.connect() as other:
            free = other.execute(text("SELECT 1 FROM seat FOR UPDATE SKIP LOCKED")).all()
        assert len(free) == 1
