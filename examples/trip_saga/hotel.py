"""The hotel's part: a room at the destination, once it is clear that somebody goes there."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from examples.trip_saga.contracts import NoRoom, RoomBooked, SeatChosen
from saga import Participant, Reject

hotel = Participant("hotel")


class Base(DeclarativeBase):
    """The tables of this service."""


class Rooms(Base):
    """How many rooms in a town are free."""

    __tablename__ = "rooms"

    town: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


class Booking(Base):
    """A room for a trip."""

    __tablename__ = "booking"

    trip_id: Mapped[UUID] = mapped_column(primary_key=True)
    town: Mapped[str]


@hotel.step(on=SeatChosen, emits=RoomBooked, rejects=NoRoom)
def book_room(chosen: SeatChosen, session: Session) -> RoomBooked:
    taken = session.execute(
        update(Rooms)
        .where(Rooms.town == chosen.destination, Rooms.free > 0)
        .values(free=Rooms.free - 1)
        .returning(Rooms.town)
    )
    if taken.first() is None:
        raise Reject(NoRoom(chosen.trip_id))
    session.add(Booking(trip_id=chosen.trip_id, town=chosen.destination))
    return RoomBooked(chosen.trip_id, chosen.carrier)


@book_room.compensation
def cancel_room(chosen: SeatChosen, _room: RoomBooked, session: Session) -> None:
    session.execute(delete(Booking).where(Booking.trip_id == chosen.trip_id))
    session.execute(
        update(Rooms).where(Rooms.town == chosen.destination).values(free=Rooms.free + 1)
    )
