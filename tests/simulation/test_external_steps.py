"""Schedules of an external step: a bank with a database of its own, workers that die or lose it at any moment,
and aborts between intent and result. What is charged at the end is what was bought."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.events import Registry
from outbox.service import Service
from saga import Participant, Reject, current, external
from saga.journal import StepState
from saga.testing.simulation import Request, Simulation
from saga.testing.world import SimulatedService, World
from tests.payments import Declined, Ordered, OutOfStock, Paid, Stocked

SCHEDULES = int(os.environ.get("SIMULATION_SCHEDULES", "40"))
SEED = int(os.environ["SIMULATION_SEED"])
FOUND_WITHIN = 400


class Shop:
    """The participants, and the bank, which takes part in nothing."""

    def __init__(self) -> None:
        registry = Registry()
        for cls in (Ordered, Paid, Declined, Stocked, OutOfStock):
            registry.event(f"order.{cls.__name__.lower()}")(cls)
        self.shop, self.payments, self.stock = (
            Participant(name, registry=registry) for name in ("shop", "payments", "stock")
        )
        self.bank = SimulatedService(Service("bank", registry=registry), create=_create_charges)
        self._declare()

    def simulation(self) -> Simulation:
        participants = (self.shop, self.payments, self.stock)
        return Simulation(
            services=[*map(SimulatedService, participants), self.bank],
            requests=[
                self._ordering(1),
                self._ordering(2, is_out_of_stock=True),
                self._ordering(3, is_declined=True),
                self._ordering(4, is_out_of_stock=True, is_declined=True),
            ],
            invariants=[what_is_charged_is_what_was_bought],
            sample=2,
        )

    def _ordering(
        self, number: int, *, is_out_of_stock: bool = False, is_declined: bool = False
    ) -> Request:
        ordered = Ordered(f"o{number}", is_out_of_stock, is_declined)

        def start(session: Session) -> None:
            self.shop.start(session, ordered, saga_id=UUID(int=number))

        return Request("shop", start, name=str(ordered))

    def _declare(self) -> None:
        self.shop.starts(Ordered, nothing_to_undo="a test")

        @self.shop.join(Paid, Stocked, completes=True)
        def ship(paid: Paid, stocked: Stocked, session: Session) -> None: ...

        @self.stock.step(on=Ordered, emits=Stocked, rejects=OutOfStock, nothing_to_undo="a test")
        def reserve(ordered: Ordered, session: Session) -> Stocked:
            if ordered.is_out_of_stock:
                raise Reject(OutOfStock(ordered.order))
            return Stocked(ordered.order)

        @self.payments.step(on=Ordered, emits=Paid, rejects=Declined, external=True)
        def charge(ordered: Ordered) -> Paid:
            if ordered.is_declined:
                raise Reject(Declined(ordered.order))
            self._bank(
                "INSERT INTO charge (key) VALUES (:key) ON CONFLICT DO NOTHING RETURNING key",
                _key(),
            )
            return Paid(ordered.order, _key())

        @charge.resolve
        def look_up(ordered: Ordered) -> Paid | None:
            return (
                Paid(ordered.order, _key())
                if self._bank("SELECT key FROM charge WHERE key = :key", _key())
                else None
            )

        @charge.compensation
        def refund(ordered: Ordered, paid: Paid, session: Session) -> None:
            self._bank(
                "UPDATE charge SET refunded = true WHERE key = :key RETURNING key", paid.reference
            )

    def _bank(self, sql: str, key: str) -> list[Any]:
        with Session(self.bank.engine) as session, session.begin():
            return list(session.execute(text(sql), {"key": key}))


def what_is_charged_is_what_was_bought(world: World) -> None:
    states = {
        str(row.saga_id): row.state
        for row in world["shop"].query("SELECT saga_id, state FROM outbox.saga")
    }
    charged = {
        row.key.partition("/")[0]
        for row in world["bank"].query("SELECT key, refunded FROM charge")
        if not row.refunded
    }
    assert charged == {saga_id for saga_id, state in states.items() if state == "completed"}, (
        f"charged is {charged}, and the sagas are {states}"
    )


def _create_charges(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE charge (key text PRIMARY KEY, refunded boolean NOT NULL DEFAULT false)"
            )
        )


def _key() -> str:
    saga = current()
    assert saga is not None
    return saga.idempotency_key


def a_result_in_an_aborted_saga_is_not_undone() -> AbstractContextManager[Any]:
    def end(runtime: Any, journal: Any, run: Any, answer: Any) -> None:
        body = run.trigger.body
        journal.record(run.key, run.before, StepState.REJECTED, trigger=body)
        external.go_on(runtime, journal, run.saga, run.trigger)

    return patch.object(external, "end_in_an_aborted_saga", end)


def nobody_asks_what_became_of_a_call() -> AbstractContextManager[Any]:
    def resolve(self: external.Call, *, aborted: bool) -> external.Answer:
        return external.Answer(took_effect=False) if aborted else self.make()

    return patch.object(external.Call, "resolve", resolve)


MUTANTS = (
    a_result_in_an_aborted_saga_is_not_undone,
    nobody_asks_what_became_of_a_call,
)


@pytest.fixture(scope="module")
def simulated() -> Simulation:
    return Shop().simulation()


@pytest.mark.timeout(3600)
def test_in_every_schedule_what_is_charged_is_what_was_bought(simulated: Simulation) -> None:
    seed = SEED * 100
    print(f"seeds from {seed}")
    report = simulated.run(SCHEDULES, seed)
    assert report.faults > SCHEDULES


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.__name__)
def test_an_external_step_with_one_thing_taken_away_is_found(
    simulated: Simulation, mutant: Callable[[], AbstractContextManager[Any]]
) -> None:
    with mutant():
        assert simulated.first_failure(FOUND_WITHIN) is not None
