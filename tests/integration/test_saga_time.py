"""Deadlines, delayed steps, pivots, and joins that need only some of their events, on real PostgreSQL."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.orm import Session

from outbox.events import Registry
from outbox.service import RetryPolicy
from saga import InvalidDeadline, Reject
from saga.testing.choreography import Choreography, Message
from tests.overlapping import StoppingParticipant, overlap

TWICE = RetryPolicy(attempts=2, first=timedelta(0), cap=timedelta(0))
DEPARTURE = datetime(2040, 5, 17, 9, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@dataclass(frozen=True)
class Asked:
    trip: str


@dataclass(frozen=True)
class Found:
    trip: str


@dataclass(frozen=True)
class Offered:
    trip: str


@dataclass(frozen=True)
class Booked:
    trip: str


@dataclass(frozen=True)
class TooLate:
    trip: str


class Agency:
    """An agency that asks two others, and books with whoever answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = Registry()
        for cls in (Asked, Found, Offered, Booked, TooLate):
            self.registry.event(f"trip.{cls.__name__.lower()}", key="trip")(cls)
        self.done: list[str] = []
        self.agency, self.rail, self.air = (
            StoppingParticipant(name, registry=self.registry, retry=TWICE, compensation_retry=TWICE)
            for name in ("agency", "rail", "air")
        )
        self.asked = self.agency.starts(
            Asked, nothing_to_undo="an unanswered question harms nobody"
        )

        @self.rail.step(on=Asked, emits=Found)
        def find(asked: Asked, session: Session) -> Found:
            return Found(asked.trip)

        @find.compensation
        def forget(asked: Asked, found: Found, session: Session) -> None:
            self.done.append("rail undone")

        @self.air.step(on=Asked, emits=Offered)
        def offer(asked: Asked, session: Session) -> Offered:
            return Offered(asked.trip)

        @offer.compensation
        def withdraw(asked: Asked, offered: Offered, session: Session) -> None:
            self.done.append("air undone")

    def too_late(self, asked: Asked, session: Session) -> TooLate:
        self.done.append("too late")
        return TooLate(asked.trip)

    def books_with_both(self, *, deadline: bool = True) -> None:
        @self.agency.join(Found, Offered, emits=Booked, completes=True)
        def book(found: Found, offered: Offered, session: Session) -> Booked:
            self.done.append("booked")
            return Booked(found.trip)

        if deadline:
            self.agency.deadline(minutes=15, rejects=TooLate, name="too_late")(self.too_late)

    def play(self) -> Choreography:
        self.stage = Choreography(dict.fromkeys((self.agency, self.rail, self.air), self.engine))
        return self.stage

    def start(self, trip: str = "t1") -> UUID:
        with Session(self.engine) as session, session.begin():
            return self.agency.start(session, Asked(trip))

    def waiting(self, what: str, saga_id: UUID) -> Message:
        """The first waiting message of that type, or to that handler, of the saga."""
        return next(
            one
            for one in self.stage.collect()
            if what in (one.type, one.handler) and str(saga_id).encode() in one.body
        )

    def settle(self, *, but: str = "") -> None:
        """Deliver what there is, except what is owed to one handler."""
        while here := [one for one in self.stage.collect() if one.handler != but]:
            self.stage.deliver(here[0])

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))

    def state(self, saga_id: UUID, participant: str = "agency") -> str:
        (row,) = self.rows(
            "SELECT state FROM outbox.saga WHERE saga_id = :id AND participant = :name",
            id=saga_id, name=participant,
        )  # fmt: skip
        return str(row.state)

    def published(self, saga_id: UUID) -> list[str]:
        rows = self.rows(
            "SELECT type FROM outbox.outbox_event WHERE position(CAST(:id AS bytea) IN body) > 0 "
            "ORDER BY position", id=str(saga_id).encode(),
        )  # fmt: skip
        return [row.type for row in rows if not row.type.startswith("saga.")]


@pytest.fixture
def trips(engine: Engine) -> Agency:
    return Agency(engine)


# ---- deadlines ----

TIMER = "agency.too_late"


def due_in(trips: Agency, saga_id: UUID, handler: str = TIMER) -> timedelta:
    (row,) = trips.rows(
        "SELECT next_attempt_at - clock_timestamp() AS due FROM outbox.pending_delivery "
        "WHERE handler = :handler AND position(CAST(:id AS bytea) IN body) > 0",
        handler=handler, id=str(saga_id).encode(),
    )  # fmt: skip
    due: timedelta = row.due
    return due


def test_a_saga_that_is_not_decided_in_time_is_aborted_and_undone(trips: Agency) -> None:
    trips.books_with_both()
    trips.play()
    saga_id = trips.start()
    trips.stage.deliver(next(m for m in trips.stage.collect() if m.service == "rail"))
    trips.stage.deliver(trips.waiting(TIMER, saga_id))
    trips.settle()
    assert trips.done[:1] == ["too late"]
    assert "rail undone" in trips.done
    assert "booked" not in trips.done
    assert trips.published(saga_id).count("trip.toolate") == 1
    assert {trips.state(saga_id, name) for name in ("agency", "rail", "air")} == {"compensated"}


def test_a_deadline_after_the_decision_does_nothing(trips: Agency) -> None:
    trips.books_with_both()
    trips.play()
    saga_id = trips.start()
    trips.settle(but=TIMER)
    assert trips.state(saga_id) == "completed"
    trips.stage.deliver(trips.waiting(TIMER, saga_id))
    trips.settle()
    assert trips.state(saga_id) == "completed"
    assert trips.done == ["booked"]


def test_a_deadline_of_a_saga_that_was_deleted_aborts_nothing_and_leaves_no_saga(
    trips: Agency,
) -> None:
    trips.books_with_both()
    trips.play()
    saga_id = trips.start()
    trips.settle(but=TIMER)
    timer = trips.waiting(TIMER, saga_id)
    with trips.engine.begin() as connection:
        connection.execute(text("DELETE FROM outbox.saga WHERE saga_id = :id"), {"id": saga_id})
    trips.stage.deliver(timer)
    trips.settle()
    assert trips.rows("SELECT 1 FROM outbox.saga WHERE saga_id = :id", id=saga_id) == []
    assert "saga.aborted" not in trips.published(saga_id)
    assert trips.done == ["booked"]


def test_a_deadline_that_is_delivered_twice_aborts_once(trips: Agency) -> None:
    trips.books_with_both()
    trips.play()
    saga_id = trips.start()
    timer = trips.waiting(TIMER, saga_id)
    trips.stage.deliver(timer)
    trips.stage.deliver(timer)
    trips.settle()
    assert trips.done.count("too late") == 1
    assert trips.published(saga_id).count("trip.toolate") == 1


@pytest.mark.parametrize("first", ["the deadline", "the join"])
def test_a_deadline_and_the_decision_at_once_have_one_winner(trips: Agency, first: str) -> None:
    trips.books_with_both()
    trips.play()
    saga_id = trips.start()
    for service in ("rail", "air"):
        trips.stage.deliver(next(m for m in trips.stage.collect() if m.service == service))
    trips.stage.deliver(trips.waiting("trip.found", saga_id))
    join, timer = trips.waiting("trip.offered", saga_id), trips.waiting(TIMER, saga_id)
    order = (timer, join) if first == "the deadline" else (join, timer)
    assert overlap(
        trips.engine,
        lambda: trips.stage.deliver(order[0]),
        lambda: trips.stage.deliver(order[1]),
        after="record",
    )
    trips.settle()
    decided = trips.state(saga_id)
    assert decided == ("compensated" if first == "the deadline" else "completed")
    assert ("booked" in trips.done) == (decided == "completed")
    assert trips.state(saga_id, "rail") == decided


def test_a_deadline_is_there_exactly_if_its_start_was_committed(trips: Agency) -> None:
    trips.books_with_both()
    trips.play()
    with Session(trips.engine) as session:
        saga_id = trips.agency.start(session, Asked("t"))
        session.rollback()
    assert all(str(saga_id).encode() not in one.body for one in trips.stage.collect())
    assert timedelta(minutes=14) < due_in(trips, trips.start()) <= timedelta(minutes=15)


def test_a_start_through_any_connection_sets_the_deadline(trips: Agency) -> None:
    trips.books_with_both()
    trips.play()
    url = make_url(trips.engine.url).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
        saga_id = trips.agency.start(connection, Asked("t"))
    assert due_in(trips, saga_id) > timedelta(minutes=14)
    with trips.engine.begin() as core:
        saga_id = trips.agency.start(core, Asked("t"))
    assert due_in(trips, saga_id) > timedelta(minutes=14)


def test_a_deadline_can_be_a_point_in_time_that_the_event_names(trips: Agency) -> None:
    trips.agency.deadline(rejects=TooLate, at=lambda asked: DEPARTURE, name="too_late")(
        trips.too_late
    )
    trips.play()
    saga_id = trips.start()
    (row,) = trips.rows(
        "SELECT next_attempt_at FROM outbox.pending_delivery WHERE handler = :handler "
        "AND position(CAST(:id AS bytea) IN body) > 0",
        handler=TIMER, id=str(saga_id).encode(),
    )  # fmt: skip
    assert row.next_attempt_at == DEPARTURE


def test_a_point_in_time_without_a_zone_is_refused_before_anything_is_committed(
    trips: Agency,
) -> None:
    trips.agency.deadline(rejects=TooLate, at=lambda asked: datetime(2040, 1, 1))(trips.too_late)  # noqa: DTZ001
    with pytest.raises(InvalidDeadline, match="aware"):
        trips.start()


def test_a_deadline_can_count_from_a_step(trips: Agency) -> None:
    @trips.agency.step(on=Found, nothing_to_undo="it only looks")
    def look(found: Found, session: Session) -> None: ...

    trips.agency.deadline(hours=2, after=look, rejects=TooLate, name="too_late")(
        lambda found, session: TooLate(found.trip)
    )
    trips.play()
    saga_id = trips.start()
    trips.settle(but=TIMER)
    assert due_in(trips, saga_id) > timedelta(minutes=118)
    trips.stage.deliver(trips.waiting(TIMER, saga_id))
    trips.settle()
    assert trips.state(saga_id) == "compensated"
    assert trips.published(saga_id)[-1] == "trip.toolate"


def test_a_deadline_that_cannot_be_said_makes_the_saga_stuck(trips: Agency) -> None:
    @trips.agency.deadline(minutes=1, rejects=TooLate)
    def too_late(asked: Asked, session: Session) -> TooLate:
        raise RuntimeError("no words")

    trips.play()
    saga_id = trips.start()
    trips.settle()
    (row,) = trips.rows(
        "SELECT stuck FROM outbox.saga WHERE saga_id = :id AND participant = 'agency'", id=saga_id
    )
    assert row.stuck


# ---- delayed steps ----


def test_a_delayed_step_runs_when_its_time_has_come(trips: Agency) -> None:
    @trips.agency.step(on=Found, after=timedelta(hours=1), nothing_to_undo="a reminder")
    def remind(found: Found, session: Session) -> None:
        trips.done.append("reminded")

    trips.play()
    saga_id = trips.start()
    trips.settle(but="agency.remind.delayed")
    assert trips.done == []
    assert due_in(trips, saga_id, "agency.remind.delayed") > timedelta(minutes=59)
    trips.stage.deliver(trips.waiting("agency.remind.delayed", saga_id))
    assert trips.done == ["reminded"]


def test_a_delayed_step_of_a_saga_that_was_aborted_meanwhile_does_nothing(trips: Agency) -> None:
    trips.books_with_both()

    @trips.agency.step(on=Found, after=timedelta(hours=1), nothing_to_undo="a reminder")
    def remind(found: Found, session: Session) -> None:
        trips.done.append("reminded")

    trips.play()
    saga_id = trips.start()
    trips.stage.deliver(next(m for m in trips.stage.collect() if m.service == "rail"))
    trips.stage.deliver(trips.waiting("trip.found", saga_id))
    trips.stage.deliver(trips.waiting(TIMER, saga_id))
    trips.stage.deliver(trips.waiting("agency.remind.delayed", saga_id))
    trips.settle()
    assert "reminded" not in trips.done
    assert trips.state(saga_id) == "compensated"


# ---- the pivot ----


def test_a_pivot_decides_the_saga_and_what_follows_only_goes_forward(trips: Agency) -> None:
    @trips.agency.step(on=Found, emits=Booked, rejects=TooLate, pivot=True)
    def pay(found: Found, session: Session) -> Booked:
        return Booked(found.trip)

    tries: list[int] = []

    @trips.air.step(on=Booked, retriable=True)
    def send_ticket(booked: Booked, session: Session) -> None:
        tries.append(1)
        if len(tries) < 2:
            raise RuntimeError("the printer is out of paper")

    trips.play()
    saga_id = trips.start()
    trips.settle()
    assert len(tries) == 2
    assert {trips.state(saga_id, name) for name in ("agency", "rail", "air")} == {"completed"}


def test_a_pivot_that_rejects_aborts_the_saga(trips: Agency) -> None:
    @trips.agency.step(on=Found, emits=Booked, rejects=TooLate, pivot=True)
    def pay(found: Found, session: Session) -> Booked:
        raise Reject(TooLate(found.trip))

    trips.play()
    saga_id = trips.start()
    trips.settle()
    assert {trips.state(saga_id, name) for name in ("agency", "rail", "air")} == {"compensated"}
    assert sorted(trips.done) == ["air undone", "rail undone"]


# ---- joins that need some of their events ----


@pytest.mark.parametrize("order", list(permutations(("trip.found", "trip.offered"))))
def test_a_join_of_any_fires_with_the_first_and_never_again(
    trips: Agency, order: tuple[str, ...]
) -> None:
    got: list[tuple[Any, ...]] = []

    @trips.agency.join(Found, Offered, needs=1, emits=Booked, completes=True)
    def book(found: Found | None, offered: Offered | None, session: Session) -> Booked:
        got.append((found, offered))
        return Booked((found or offered).trip)  # type: ignore[union-attr]

    trips.play()
    saga_id = trips.start()
    for service in ("rail", "air"):
        trips.stage.deliver(next(m for m in trips.stage.collect() if m.service == service))
    for type in order:
        trips.stage.deliver(trips.waiting(type, saga_id))
    trips.settle()
    came = [event is not None for event in got[0]]
    assert (len(got), came) == (1, [order[0] == "trip.found", order[0] == "trip.offered"])
    assert trips.published(saga_id).count("trip.booked") == 1


@pytest.mark.parametrize("last", ["trip.found", "trip.offered", "trip.asked"])
def test_a_compensation_gets_exactly_what_its_join_got(trips: Agency, last: str) -> None:
    got: list[tuple[Any, ...]] = []
    undone: list[tuple[Any, ...]] = []

    @trips.agency.join(Asked, Found, Offered, needs=2)
    def note(*events_and_session: Any) -> None:
        got.append(events_and_session[:-1])

    @note.compensation
    def unnote(*events_and_session: Any) -> None:
        undone.append(events_and_session[:-1])

    trips.agency.deadline(minutes=1, rejects=TooLate, name="too_late")(trips.too_late)
    trips.play()
    saga_id = trips.start()
    for service in ("rail", "air"):
        trips.stage.deliver(next(m for m in trips.stage.collect() if m.service == service))
    types = ("trip.asked", "trip.found", "trip.offered")
    for type in sorted(types, key=lambda one: one == last):
        message = next(
            m for m in trips.stage.collect()
            if (m.type, m.service, m.handler) == (type, "agency", None) and str(saga_id).encode() in m.body
        )  # fmt: skip
        trips.stage.deliver(message)
    assert [event is None for event in got[0]] == [type == last for type in types]
    trips.stage.deliver(trips.waiting(TIMER, saga_id))
    trips.settle()
    assert (len(got), undone) == (1, got)
