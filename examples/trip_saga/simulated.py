"""The trip example under simulation: its services as they are, what is asked of them, what must hold in the end."""

from __future__ import annotations

from collections import Counter
from functools import partial
from uuid import UUID

from sqlalchemy.orm import Session

from examples.trip_saga import carriers, hotel, trips
from saga.testing.simulation import Faults, Request, Simulation
from saga.testing.world import SimulatedService, World

SEATS = {"rail": {"Lisbon": 1, "Turin": 1}, "air": {"Lisbon": 1, "Oslo": 1}}
ROOMS = {"Lisbon": 2, "Turin": 1}
CREDIT = {"alice": 900, "bob": 100}

REQUESTS = (
    ("alice", "Lisbon"),
    ("alice", "Turin"),
    ("bob", "Lisbon"),
    ("alice", "Oslo"),
    ("alice", "Narnia"),
)
"""Both carriers, one of them, no money, no room, and nobody goes there."""


def simulation(faults: Faults | None = None, *, sample: int | None = 2) -> Simulation:
    """The trip example, ready to be run over as many schedules as you like, with *sample* of the trips in each."""
    return Simulation(
        services=[
            SimulatedService(trips.trips, create=trips.Base.metadata.create_all, fill=_customers),
            *(
                SimulatedService(
                    carrier,
                    create=carriers.Base.metadata.create_all,
                    fill=partial(_seats, carrier.name),
                )
                for carrier in (carriers.rail, carriers.air)
            ),
            SimulatedService(hotel.hotel, create=hotel.Base.metadata.create_all, fill=_rooms),
        ],
        requests=[_requesting(number, *one) for number, one in enumerate(REQUESTS, 1)],
        invariants=[every_trip_is_whole],
        faults=faults or Faults(),
        sample=sample,
    )


def one_trip(number: int) -> Simulation:
    """One of the `REQUESTS` alone."""
    whole = simulation(sample=None)
    return Simulation(
        services=whole.services, requests=[whole.requests[number]], invariants=whole.invariants
    )


def every_trip_is_whole(world: World) -> None:
    """Booked: one seat with a ticket, one room, paid once. Cancelled: nothing of it is left anywhere."""
    asked = world["trips"].query("SELECT id, customer, destination, status FROM trip")
    booked = {row.id for row in asked if row.status == "booked"}
    assert {row.status for row in asked} <= {"booked", "cancelled"}, "trips are left open"
    held: Counter[UUID] = Counter()
    for name, seats in SEATS.items():
        holds = world[name].query("SELECT trip_id, destination, ticketed FROM hold")
        held.update(row.trip_id for row in holds)
        assert all(row.ticketed for row in holds), f"{name} holds seats without a ticket"
        for destination, free in world[name].query("SELECT destination, free FROM seats"):
            taken = sum(row.destination == destination for row in holds)
            assert free + taken == seats[destination], (
                f"{name} to {destination}: {free} and {taken}"
            )
    assert held == Counter(booked), "seats are not those of the booked trips"
    rooms = world["hotel"].query("SELECT trip_id, town FROM booking")
    assert Counter(row.trip_id for row in rooms) == Counter(booked), "rooms are not theirs"
    for town, free in world["hotel"].query("SELECT town, free FROM rooms"):
        assert free + sum(row.town == town for row in rooms) == ROOMS[town]
    for name, credit in world["trips"].query("SELECT name, credit FROM customer"):
        trips_of = sum(row.id in booked for row in asked if row.customer == name)
        assert credit + trips_of * trips.PRICE == CREDIT[name], f"{name} has {credit} left"


def _customers(session: Session) -> None:
    session.add_all(trips.Customer(name=name, credit=credit) for name, credit in CREDIT.items())


def _seats(carrier: str, session: Session) -> None:
    seats = SEATS[carrier].items()
    session.add_all(carriers.Seats(destination=town, free=free) for town, free in seats)


def _rooms(session: Session) -> None:
    session.add_all(hotel.Rooms(town=town, free=free) for town, free in ROOMS.items())


def _requesting(number: int, customer: str, destination: str) -> Request:
    request = partial(
        trips.request_trip, trip_id=UUID(int=number), customer=customer, destination=destination
    )
    return Request("trips", request, name=f"{customer} wants to go to {destination}")


if __name__ == "__main__":
    from saga.testing import command

    command.run(simulation())
