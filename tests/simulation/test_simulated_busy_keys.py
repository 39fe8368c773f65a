"""Schedules of sagas whose steps publish ordered events of one key, until it is busy and beyond."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import context as handling
from outbox import places
from outbox.busy_keys import SPAN
from outbox.connections import executor
from outbox.counting import Counted, draw
from outbox.events import Registry
from outbox.places import Place
from outbox.publishing import publish
from outbox.sql import DEFAULT_SCHEMA
from saga import Participant, Reject
from saga.testing.choices import Seeded
from saga.testing.simulation import Faults, Request, Simulation, _Run
from saga.testing.world import SimulatedService, World
from tests.simulation.test_order_saga import SCHEDULES, SEED

KEY = Counted("bank", "money.moved", "a")


@dataclass(frozen=True)
class Opened:
    account: str
    moves: int
    is_refused: bool = False


@dataclass(frozen=True)
class Moved:
    account: str


@dataclass(frozen=True)
class Paid:
    account: str


@dataclass(frozen=True)
class Refused:
    account: str


def payments(*sagas: Opened, begins_at: int = 1) -> Simulation:
    """The bank moves money for each saga, one ordered event each; the books have them from number *begins_at* on."""
    registry = Registry()
    for cls in (Opened, Paid, Refused):
        registry.event(f"payment.{cls.__name__.lower()}", key="account")(cls)
    registry.event(KEY.type, key="account", ordered=True)(Moved)
    desk, bank, books = (Participant(name, registry=registry) for name in ("desk", "bank", "books"))
    desk.starts(Opened, nothing_to_undo="a wish")
    desk.join(Paid, completes=True, name="end")(lambda paid, session: None)
    bank.publishes(Moved)

    @bank.step(on=Opened, emits=Paid, rejects=Refused, nothing_to_undo="what is moved is moved")
    def pay(opened: Opened, session: Session) -> Paid:
        for _ in range(opened.moves):
            publish(session, Moved(opened.account), registry=registry)
        if opened.is_refused:
            raise Reject(Refused(opened.account))
        return Paid(opened.account)

    @books.on(Moved)
    def book(moved: Moved, session: Session) -> None:
        handled = handling.current()
        assert handled is not None
        session.execute(
            text("INSERT INTO booked (at, event_id) SELECT count(*) + 1, :event_id FROM booked"),
            {"event_id": handled.envelope.id},
        )

    def counted(session: Session) -> None:
        if begins_at > 1:
            draw(executor(session), KEY, begins_at - 1, DEFAULT_SCHEMA)

    def handled(session: Session) -> None:
        place = Place("books", "books.book", *KEY, 1)
        found = places.lock(session, place, DEFAULT_SCHEMA)
        places.write(session, place, found, begins_at, [], DEFAULT_SCHEMA)

    return Simulation(
        services=[
            SimulatedService(desk),
            SimulatedService(bank, fill=counted),
            SimulatedService(books, create=_create, fill=handled),
        ],
        requests=[
            Request("desk", partial(desk.start, event=opened, saga_id=UUID(int=number)), "opens")
            for number, opened in enumerate(sagas, 1)
        ],
        invariants=[partial(everything_is_booked_in_order, sagas, begins_at)],
    )


def _create(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE booked (at bigint PRIMARY KEY, event_id uuid)"))


def everything_is_booked_in_order(sagas: tuple[Opened, ...], begins_at: int, world: World) -> None:
    """Numbers without a gap in the order of the log, and each handled once, in that order."""
    ends = {row["saga_id"].int: row["state"] for row in world["desk"].rows("saga")}
    expected = sum(
        one.moves for number, one in enumerate(sagas, 1) if ends.get(number) == "completed"
    )
    log = sorted(world["bank"].rows("outbox_event"), key=lambda row: row["position"])
    moves = [row for row in log if row["type"] == KEY.type]
    assert [row["key_seq"] for row in moves] == list(range(begins_at, begins_at + expected))
    booked = world["books"].query("SELECT event_id FROM booked ORDER BY at")
    assert [row.event_id for row in booked] == [row["event_id"] for row in moves]
    following = begins_at + expected
    counted = world["bank"].rows("outbox_busy_key" if following > SPAN else "outbox_key")
    handled = world["books"].rows("inbox_busy_order" if following >= SPAN else "inbox_order")
    assert [row["seq"] for row in counted] == [following - 1]
    assert [row["next_seq"] for row in handled] == [following]


@pytest.mark.timeout(600)
def test_a_saga_publishes_until_a_key_is_busy_and_all_of_it_is_handled() -> None:
    simulation = replace(
        payments(Opened("a", SPAN - 1), Opened("a", 4)), faults=Faults(0, 0, 0, 0, 0)
    )
    simulation.run(1)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("begins_at", [SPAN - 3, 2 * SPAN - 3], ids=["gets busy", "is busy"])
@pytest.mark.parametrize("batch", [1, 4])
def test_sagas_that_count_one_key_side_by_side_leave_no_gap(begins_at: int, batch: int) -> None:
    sagas = (Opened("a", 2), Opened("a", 1, is_refused=True), Opened("a", 3), Opened("a", 2))
    simulation = replace(payments(*sagas, begins_at=begins_at), batch=batch)
    report = simulation.run(max(SCHEDULES // 2, 1), SEED * 100)
    assert report.faults > 0


def test_a_schedule_does_not_depend_on_the_busy_keys_of_those_before_it() -> None:
    simulation = payments(Opened("a", 3), Opened("a", 3), begins_at=SPAN - 2)

    def decisions() -> list[int]:
        run = _Run(simulation, Seeded(1))
        run.to_the_end()
        return list(run.choices.made)

    assert decisions() == decisions()
