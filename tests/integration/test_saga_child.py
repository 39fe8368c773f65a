"""Sagas that start another saga and wait for its end, on real PostgreSQL."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.errors import ConfigurationError
from outbox.events import Registry
from outbox.service import RetryPolicy
from saga import Participant, Reject
from saga.testing.choreography import Choreography, Message
from tests.overlapping import StoppingParticipant, overlap

TWICE = RetryPolicy(attempts=2, first=timedelta(0), cap=timedelta(0))


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@dataclass(frozen=True)
class TripAsked:
    trip: str
    leg_fails: bool = False
    cancelled: bool = False


@dataclass(frozen=True)
class LegAsked:
    trip: str
    fails: bool


@dataclass(frozen=True)
class LegFound:
    trip: str


@dataclass(frozen=True)
class LegRefused:
    trip: str


@dataclass(frozen=True)
class LegBooked:
    trip: str


@dataclass(frozen=True)
class NoLeg:
    trip: str


@dataclass(frozen=True)
class TripDone:
    trip: str


@dataclass(frozen=True)
class TripCancelled:
    trip: str


class Agency:
    """A trip whose leg is a saga of its own: an agency, a carrier that has the leg, and a doubter
    that may cancel the trip while the leg is being booked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = Registry()
        for cls in (
            TripAsked, LegAsked, LegFound, LegRefused, LegBooked, NoLeg, TripDone, TripCancelled,
        ):  # fmt: skip
            self.registry.event(f"trip.{cls.__name__.lower()}", key="trip")(cls)
        self.agency, self.carrier, self.doubter = (
            StoppingParticipant(name, registry=self.registry, retry=TWICE, compensation_retry=TWICE)
            for name in ("agency", "carrier", "doubter")
        )
        self.done: list[str] = []
        self._declare_agency()
        self._declare_carrier()

        @self.doubter.step(on=TripAsked, rejects=TripCancelled, nothing_to_undo="it only doubts")
        def doubt(asked: TripAsked, session: Session) -> None:
            if asked.cancelled:
                raise Reject(TripCancelled(asked.trip))

        self.stage = Choreography(dict.fromkeys((self.agency, self.carrier, self.doubter), engine))

    def _declare_agency(self) -> None:
        self.agency.starts(TripAsked, nothing_to_undo="a question")
        self.agency.starts(LegAsked, nothing_to_undo="a question")

        @self.agency.child(on=TripAsked, opens=LegAsked, emits=LegBooked, rejects=NoLeg)
        def book_leg(asked: TripAsked, session: Session) -> LegAsked:
            return LegAsked(asked.trip, asked.leg_fails)

        @book_leg.completed
        def leg_is_booked(asked: TripAsked, session: Session) -> LegBooked:
            self.done.append("leg booked")
            return LegBooked(asked.trip)

        @book_leg.aborted
        def leg_is_not_booked(asked: TripAsked, session: Session) -> NoLeg:
            return NoLeg(asked.trip)

        @book_leg.compensation
        def cancel_leg(asked: TripAsked, booked: LegBooked, session: Session) -> None:
            self.done.append("leg cancelled")

        @self.agency.join(LegBooked, emits=TripDone, completes=True)
        def finish(booked: LegBooked, session: Session) -> TripDone:
            return TripDone(booked.trip)

    def _declare_carrier(self) -> None:
        @self.carrier.step(on=LegAsked, emits=LegFound, rejects=LegRefused, pivot=True)
        def find(asked: LegAsked, session: Session) -> LegFound:
            if asked.fails:
                raise Reject(LegRefused(asked.trip))
            self.done.append("leg found")
            return LegFound(asked.trip)

    def start(self, **how: bool) -> UUID:
        with Session(self.engine) as session, session.begin():
            return self.agency.start(session, TripAsked("t", **how))

    def child_of(self, saga_id: UUID) -> UUID:
        (row,) = self.rows("SELECT child_id FROM outbox.saga_child WHERE saga_id = :id", id=saga_id)
        child: UUID = row.child_id
        return child

    def waiting(self, type: str, service: str, saga_id: UUID) -> Message:
        return next(
            one
            for one in self.stage.collect()
            if (one.type, one.service) == (type, service) and str(saga_id).encode() in one.body
        )

    def states(self, saga_id: UUID) -> set[str]:
        rows = self.rows("SELECT state FROM outbox.saga WHERE saga_id = :id", id=saga_id)
        return {row.state for row in rows}

    def run(self, saga_id: UUID) -> str:
        (row,) = self.rows(
            "SELECT state FROM outbox.saga_step WHERE saga_id = :id AND step = 'book_leg'",
            id=saga_id,
        )
        return str(row.state)

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))


@pytest.fixture
def trips(engine: Engine) -> Agency:
    return Agency(engine)


def test_a_step_is_done_when_the_saga_that_it_started_is_completed(trips: Agency) -> None:
    saga_id = trips.start()
    trips.stage.deliver(trips.waiting("trip.tripasked", "agency", saga_id))
    assert trips.run(saga_id) == "calling"
    trips.stage.settle()
    assert trips.states(trips.child_of(saga_id)) == {"completed"}
    assert trips.states(saga_id) == {"completed"}
    assert trips.run(saga_id) == "done"
    assert trips.done == ["leg found", "leg booked"]


def test_a_step_rejects_when_the_saga_that_it_started_is_aborted(trips: Agency) -> None:
    saga_id = trips.start(leg_fails=True)
    trips.stage.settle()
    assert trips.states(trips.child_of(saga_id)) == {"compensated"}
    assert trips.states(saga_id) == {"compensated"}
    assert trips.run(saga_id) == "rejected"
    assert trips.done == []


@pytest.mark.parametrize("leg_fails", [False, True], ids=["completed", "aborted"])
def test_a_parent_that_is_aborted_waits_for_its_child_and_undoes_what_it_did(
    trips: Agency, leg_fails: bool
) -> None:
    saga_id = trips.start(leg_fails=leg_fails, cancelled=True)
    trips.stage.deliver(trips.waiting("trip.tripasked", "agency", saga_id))
    trips.stage.deliver(trips.waiting("trip.tripasked", "doubter", saga_id))
    trips.stage.deliver(trips.waiting("saga.aborted", "agency", saga_id))
    assert trips.states(saga_id) == {"compensating", "compensated"}
    assert trips.run(saga_id) == "calling"
    trips.stage.settle()
    assert trips.states(saga_id) == {"compensated"}
    assert trips.run(saga_id) == ("rejected" if leg_fails else "compensated")
    assert trips.done == ([] if leg_fails else ["leg found", "leg booked", "leg cancelled"])


def test_duplicates_of_everything_change_nothing(trips: Agency) -> None:
    saga_id = trips.start()
    trips.stage.settle()
    for message in list(trips.stage.delivered):
        trips.stage.deliver(message)
    trips.stage.settle()
    assert trips.states(saga_id) == {"completed"}
    assert trips.done == ["leg found", "leg booked"]


@pytest.mark.parametrize("first", ["the child's end", "the abort"])
def test_the_end_of_a_child_and_an_abort_of_its_parent_at_once_leave_nothing_behind(
    trips: Agency, first: str
) -> None:
    saga_id = trips.start(cancelled=True)
    trips.stage.deliver(trips.waiting("trip.tripasked", "agency", saga_id))
    trips.stage.deliver(trips.waiting("trip.tripasked", "doubter", saga_id))
    child = trips.child_of(saga_id)
    trips.stage.deliver(trips.waiting("trip.legasked", "carrier", child))
    end = trips.waiting("saga.completed", "agency", child)
    abort = trips.waiting("saga.aborted", "agency", saga_id)
    order = (end, abort) if first == "the child's end" else (abort, end)
    assert overlap(
        trips.engine,
        lambda: trips.stage.deliver(order[0]),
        lambda: trips.stage.deliver(order[1]),
        after="find" if first == "the child's end" else "runs",
    )
    trips.stage.settle()
    assert trips.states(saga_id) == {"compensated"}
    assert trips.done == ["leg found", "leg booked", "leg cancelled"]


def test_a_child_that_does_not_say_what_follows_makes_the_saga_stuck(engine: Engine) -> None:
    registry = Registry()
    for cls in (TripAsked, LegAsked, NoLeg):
        registry.event(f"trip.{cls.__name__.lower()}", key="trip")(cls)
    lazy = Participant("lazy", registry=registry, retry=TWICE)
    lazy.starts(TripAsked, nothing_to_undo="a question")
    lazy.starts(LegAsked, nothing_to_undo="a question")

    @lazy.child(on=TripAsked, opens=LegAsked, rejects=NoLeg, nothing_to_undo="nothing yet")
    def book(asked: TripAsked, session: Session) -> LegAsked:
        return LegAsked(asked.trip, False)

    with pytest.raises(ConfigurationError, match="completed"):
        book.refuse_what_is_missing()
    stage = Choreography({lazy: engine})
    with Session(engine) as session, session.begin():
        saga_id = lazy.start(session, TripAsked("t"))
    stage.settle()
    with engine.connect() as connection:
        row = connection.execute(
            text("SELECT stuck FROM outbox.saga WHERE saga_id = :id"), {"id": saga_id}
        ).one()
    assert row.stuck
