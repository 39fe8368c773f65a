"""The trips' own part: it asks, chooses the first seat that is offered, and is paid last.

Being paid is the pivot: until then everything can be undone, after it the trip takes place. The
deadline is here too, because here the saga is decided.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from examples.trip_saga.contracts import (
    AirFull,
    AirSeatHeld,
    NobodyGoes,
    NotPaid,
    RailFull,
    RailSeatHeld,
    RoomBooked,
    SeatChosen,
    TimedOut,
    TripBooked,
    TripRequested,
)
from saga import Participant, Reject

PRICE = 300

trips = Participant("trips")


class Base(DeclarativeBase):
    """The tables of this service."""


class Customer(Base):
    """Somebody who travels, and what they have paid in."""

    __tablename__ = "customer"

    name: Mapped[str] = mapped_column(primary_key=True)
    credit: Mapped[int]


class Trip(Base):
    """What a customer asked for, and what became of it: requested, booked or cancelled."""

    __tablename__ = "trip"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    customer: Mapped[str]
    destination: Mapped[str]
    status: Mapped[str] = mapped_column(default="requested")


def request_trip(session: Session, *, trip_id: UUID, customer: str, destination: str) -> None:
    """Store the trip and begin its saga, in the caller's transaction."""
    trips.start(session, TripRequested(trip_id, destination), saga_id=trip_id)
    session.add(Trip(id=trip_id, customer=customer, destination=destination))


@trips.compensation(TripRequested)
def cancel_trip(requested: TripRequested, session: Session) -> None:
    session.execute(update(Trip).where(Trip.id == requested.trip_id).values(status="cancelled"))


@trips.deadline(minutes=10, rejects=TimedOut)
def give_up(requested: TripRequested, _session: Session) -> TimedOut:
    return TimedOut(requested.trip_id)


@trips.join(
    RailSeatHeld, AirSeatHeld, needs=1, emits=SeatChosen, nothing_to_undo="a choice binds nobody"
)
def choose_seat(
    rail: RailSeatHeld | None, air: AirSeatHeld | None, _session: Session
) -> SeatChosen:
    if rail is not None:
        return SeatChosen(rail.trip_id, "rail", rail.destination)
    assert air is not None
    return SeatChosen(air.trip_id, "air", air.destination)


@trips.join(RailFull, AirFull, rejects=NobodyGoes, nothing_to_undo="it only ever rejects")
def refuse_trip(rail: RailFull, _air: AirFull, _session: Session) -> None:
    # A carrier that let its seat go because the other one was chosen is "full" as well.
    raise Reject(NobodyGoes(rail.trip_id))


@trips.step(on=RoomBooked, emits=TripBooked, rejects=NotPaid, pivot=True)
def take_payment(room: RoomBooked, session: Session) -> TripBooked:
    trip = session.get_one(Trip, room.trip_id)
    paid = session.execute(
        update(Customer)
        .where(Customer.name == trip.customer, Customer.credit >= PRICE)
        .values(credit=Customer.credit - PRICE)
        .returning(Customer.name)
    )
    if paid.first() is None:
        raise Reject(NotPaid(room.trip_id))
    trip.status = "booked"
    return TripBooked(room.trip_id, room.carrier)
