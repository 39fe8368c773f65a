"""Rail and air: each holds a seat for a trip, and lets it go when the other one was chosen.

The choice can overtake the request on its way here. So it is written down, and a request that comes
after it holds no seat any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from examples.trip_saga.contracts import (
    AirFull,
    AirSeatHeld,
    RailFull,
    RailSeatHeld,
    SeatChosen,
    TripBooked,
    TripRequested,
)
from saga import Participant


class Base(DeclarativeBase):
    """The tables of a carrier."""


class Seats(Base):
    """How many seats to a destination are free."""

    __tablename__ = "seats"

    destination: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


class Hold(Base):
    """A seat that waits for a trip; with a ticket once the trip is paid for."""

    __tablename__ = "hold"

    trip_id: Mapped[UUID] = mapped_column(primary_key=True)
    destination: Mapped[str]
    ticketed: Mapped[bool] = mapped_column(default=False)


class Choice(Base):
    """Whom a trip goes with."""

    __tablename__ = "choice"

    trip_id: Mapped[UUID] = mapped_column(primary_key=True)
    carrier: Mapped[str]


@dataclass(frozen=True)
class Words:
    """What a carrier calls its answers."""

    held: type[RailSeatHeld] | type[AirSeatHeld]
    full: type[RailFull] | type[AirFull]


def carrier(name: str, words: Words) -> Participant:
    """The service of one carrier."""
    participant = Participant(name)

    @participant.step(on=TripRequested, emits=(words.held, words.full))
    def hold_seat(
        trip: TripRequested, session: Session
    ) -> RailSeatHeld | AirSeatHeld | RailFull | AirFull:
        if session.get(Choice, trip.trip_id) is not None:
            return words.full(trip.trip_id)
        taken = session.execute(
            update(Seats)
            .where(Seats.destination == trip.destination, Seats.free > 0)
            .values(free=Seats.free - 1)
            .returning(Seats.destination)
        )
        if taken.first() is None:
            return words.full(trip.trip_id)
        session.add(Hold(trip_id=trip.trip_id, destination=trip.destination))
        return words.held(trip.trip_id, trip.destination)

    @hold_seat.compensation
    def free_seat(trip: TripRequested, _answer: object, session: Session) -> None:
        let_go(trip.trip_id, session)

    @participant.step(on=SeatChosen, nothing_to_undo="a seat that was let go stays free")
    def heed_choice(chosen: SeatChosen, session: Session) -> None:
        session.add(Choice(trip_id=chosen.trip_id, carrier=chosen.carrier))
        if chosen.carrier != name:
            let_go(chosen.trip_id, session)

    @participant.step(on=TripBooked, retriable=True)
    def issue_ticket(booked: TripBooked, session: Session) -> None:
        if booked.carrier == name:
            issued = update(Hold).where(Hold.trip_id == booked.trip_id).values(ticketed=True)
            session.execute(issued)

    return participant


def let_go(trip_id: UUID, session: Session) -> None:
    """Free the seat that is held for a trip, if one is."""
    released = session.execute(
        delete(Hold).where(Hold.trip_id == trip_id).returning(Hold.destination)
    ).first()
    if released is not None:
        session.execute(
            update(Seats)
            .where(Seats.destination == released.destination)
            .values(free=Seats.free + 1)
        )


rail = carrier("rail", Words(RailSeatHeld, RailFull))
air = carrier("air", Words(AirSeatHeld, AirFull))
