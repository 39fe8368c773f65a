"""What the services say to each other. This file is all that they share."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from outbox import event

# ---- said by trips ----


@event("trip.requested", key="trip_id")
@dataclass(frozen=True)
class TripRequested:
    """A customer wants to go somewhere, whichever way."""

    trip_id: UUID
    destination: str


@event("trip.seat_chosen", key="trip_id")
@dataclass(frozen=True)
class SeatChosen:
    """Of the seats that are held, this one is wanted; the others can be let go."""

    trip_id: UUID
    carrier: str
    destination: str


@event("trip.booked", key="trip_id")
@dataclass(frozen=True)
class TripBooked:
    """It is paid for: from here the trip only goes forward."""

    trip_id: UUID
    carrier: str


@event("trip.nobody_goes", key="trip_id")
@dataclass(frozen=True)
class NobodyGoes:
    """No carrier has a seat."""

    trip_id: UUID


@event("trip.not_paid", key="trip_id")
@dataclass(frozen=True)
class NotPaid:
    """The customer's credit does not suffice."""

    trip_id: UUID


@event("trip.timed_out", key="trip_id")
@dataclass(frozen=True)
class TimedOut:
    """It took too long."""

    trip_id: UUID


# ---- said by rail and by air ----


@event("rail.seat_held", key="trip_id")
@dataclass(frozen=True)
class RailSeatHeld:
    """A seat on a train waits for the trip."""

    trip_id: UUID
    destination: str


@event("rail.full", key="trip_id")
@dataclass(frozen=True)
class RailFull:
    """No train has a seat, or the trip needs none any more."""

    trip_id: UUID


@event("air.seat_held", key="trip_id")
@dataclass(frozen=True)
class AirSeatHeld:
    """A seat on a plane waits for the trip."""

    trip_id: UUID
    destination: str


@event("air.full", key="trip_id")
@dataclass(frozen=True)
class AirFull:
    """No plane has a seat, or the trip needs none any more."""

    trip_id: UUID


# ---- said by hotel ----


@event("hotel.room_booked", key="trip_id")
@dataclass(frozen=True)
class RoomBooked:
    """There is a room at the destination."""

    trip_id: UUID
    carrier: str


@event("hotel.no_room", key="trip_id")
@dataclass(frozen=True)
class NoRoom:
    """There is none."""

    trip_id: UUID
