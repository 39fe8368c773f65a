"""Sagas that are in flight while another version of a participant is deployed, on PostgreSQL.

A deployment is a new `Participant` of the same name over the same database; what was on its way
stays on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import quarantine
from outbox.events import Registry
from outbox.service import RetryPolicy
from saga import Participant, Reject, current
from saga.operating import Operator, resume, skip_compensation
from saga.testing.choreography import Choreography, Message

AT_ONCE = RetryPolicy(attempts=2, first=timedelta(0), cap=timedelta(0))
SOMEBODY = Operator("ann", "the step is back")


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@dataclass(frozen=True)
class Placed:
    id: str


@dataclass(frozen=True)
class PlacedInMoney:
    id: str
    currency: str


@dataclass(frozen=True)
class Packed:
    id: str


@dataclass(frozen=True)
class Paid:
    id: str


@dataclass(frozen=True)
class Refused:
    id: str


class Log:
    """What was done and undone, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def does(self, what: str, answer: type[Any] | None = None) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            self.lines.append(what)
            return None if answer is None else answer(arguments[0].id)

        return function


Wire = Callable[[Participant, Log], None]


@dataclass
class Deployed:
    """A version of the choreography: order starts and decides, work packs, till pays."""

    log: Log
    engine: Engine
    work: Wire
    refuses: bool = False
    placed: type[Any] = Placed
    version: int = 1
    known: Choreography | None = None
    """What is on its way when this is deployed."""

    def __post_init__(self) -> None:
        registry = Registry()
        registry.event("shop.placed", version=self.version, key="id")(self.placed)
        for cls in (Packed, Paid, Refused):
            registry.event(f"shop.{cls.__name__.lower()}", key="id")(cls)
        if self.version > 1:
            registry.upcast("shop.placed", from_version=1)(lambda data: {**data, "currency": "EUR"})
        self.order, self.shop, self.till = (
            Participant(name, registry=registry, retry=AT_ONCE, compensation_retry=AT_ONCE)
            for name in ("order", "work", "till")
        )
        self.order.starts(self.placed).compensation(self.log.does("cancelled"))
        self.order.join(Packed, Paid, completes=True, name="end")(self.log.does("completed"))
        self.work(self.shop, self.log)
        self.till.step(on=self.placed, emits=Paid, rejects=Refused, name="pay")(
            self._pay
        ).compensation(self.log.does("paid back"))
        services = dict.fromkeys((self.order, self.shop, self.till), self.engine)
        self.play = Choreography(services)
        if self.known is not None:
            self.play.take_over(self.known)

    def _pay(self, placed: Any, session: Session) -> Paid:
        if self.refuses:
            raise Reject(Refused(placed.id))
        self.log.lines.append("paid")
        return Paid(placed.id)

    def start(self) -> UUID:
        with Session(self.engine) as session, session.begin():
            return self.order.start(session, self.placed("o1"))

    def deliver(self, type: str, to: str) -> Message:
        """Deliver the one waiting message of that type to that service."""
        self.play.collect()
        (message,) = [one for one in self.play.waiting if (one.type, one.service) == (type, to)]
        self.play.deliver(message)
        return message

    def states(self, saga_id: UUID) -> dict[str, str]:
        with Session(self.engine) as session:
            rows = session.execute(
                text("SELECT participant, state FROM outbox.saga WHERE saga_id = :id"),
                {"id": saga_id},
            ).all()
        return {row.participant: row.state for row in rows}

    def row(self, saga_id: UUID, participant: str) -> Any:
        with Session(self.engine) as session:
            return session.execute(
                text("SELECT * FROM outbox.saga WHERE saga_id = :id AND participant = :p"),
                {"id": saga_id, "p": participant},
            ).one()

    def runs(self, saga_id: UUID) -> dict[str, tuple[str, str | None]]:
        with Session(self.engine) as session:
            rows = session.execute(
                text(
                    "SELECT participant, step, state, reason FROM outbox.saga_step "
                    "WHERE saga_id = :id"
                ),
                {"id": saga_id},
            ).all()
        return {f"{row.participant}.{row.step}": (row.state, row.reason) for row in rows}


def pack(work: Participant, log: Log) -> None:
    work.step(on=Placed, emits=Packed, name="pack")(log.does("packed", Packed)).compensation(
        log.does("unpacked")
    )


def wrap(work: Participant, log: Log) -> None:
    """The same step under a new name."""
    work.step(on=Placed, emits=Packed, name="wrap", was="pack")(
        log.does("wrapped", Packed)
    ).compensation(log.does("unwrapped"))


def nothing(work: Participant, log: Log) -> None:
    """The step is gone."""


@pytest.fixture
def log() -> Log:
    return Log()


def whole(deployed: Deployed, saga_id: UUID, state: str) -> None:
    deployed.play.settle()
    assert set(deployed.states(saga_id).values()) == {state}


@pytest.mark.parametrize("before", [0, 1, 2], ids="{}_delivered_before".format)
@pytest.mark.parametrize("refuses", [False, True], ids=["completes", "aborts"])
def test_a_saga_that_is_in_flight_over_a_renaming_ends_whole(
    before: int, refuses: bool, engine: Engine, log: Log
) -> None:
    first = Deployed(log, engine, pack)
    saga_id = first.start()
    first.play.collect()
    if before >= 1:
        message = first.deliver("shop.placed", "work")
    if before >= 2:
        first.deliver("shop.packed", "order")
    second = Deployed(log, engine, wrap, refuses, known=first.play)
    if before >= 1:
        second.play.deliver(message)
    whole(second, saga_id, "compensated" if refuses else "completed")
    done = "wrapped" if before == 0 else "packed"
    assert log.lines.count("packed") + log.lines.count("wrapped") <= 1
    if refuses:
        assert "completed" not in log.lines
        assert log.lines.count("unwrapped") == log.lines.count(done)
        assert log.lines.count("cancelled") == 1
    else:
        assert sorted(log.lines) == sorted([done, "paid", "completed"])


def test_workers_of_both_versions_run_a_renamed_step_once_between_them(
    engine: Engine, log: Log
) -> None:
    first = Deployed(log, engine, pack)
    saga_id = first.start()
    second = Deployed(log, engine, wrap, known=first.play)
    message = second.deliver("shop.placed", "work")
    first.play.deliver(message)
    second.play.deliver(message)
    first.play.deliver(message)
    assert log.lines == ["wrapped"]
    assert second.runs(saga_id)["work.pack"] == ("skipped", "it ran as wrap, which was pack")
    whole(second, saga_id, "completed")


@pytest.mark.parametrize("order", ["old_first", "new_first"])
def test_workers_of_both_versions_count_for_a_renamed_join_together(
    order: str, engine: Engine, log: Log
) -> None:
    first = Deployed(log, engine, pack)
    saga_id = first.start()
    second = Deployed(log, engine, pack, known=first.play)
    second.order = renamed_join(second, log)
    second.play.receivers.update(Choreography({second.order: engine}).receivers)
    for _ in range(2):
        second.play.collect()
        for message in [one for one in second.play.waiting if one.service != "order"]:
            second.play.deliver(message)
    second.play.collect()
    sides = [first.play, second.play] if order == "old_first" else [second.play, first.play]
    messages = [
        next(one for one in second.play.waiting if (one.type, one.service) == (type, "order"))
        for type in ("shop.packed", "shop.paid")
    ]
    for side, message in zip(sides, messages, strict=True):
        side.deliver(message)
    assert log.lines.count("completed") == 1
    for message in messages:
        first.play.deliver(message)
        second.play.deliver(message)
    assert log.lines.count("completed") == 1
    second.play.settle()
    assert second.states(saga_id)["order"] == "completed"


def renamed_join(deployed: Deployed, log: Log) -> Participant:
    order = Participant("order", registry=deployed.shop.registry)
    order.starts(Placed).compensation(log.does("cancelled"))
    order.join(Packed, Paid, completes=True, name="finish", was="end")(log.does("completed"))
    return order


def test_a_retry_that_is_owed_to_the_old_name_runs_under_the_new_one(
    engine: Engine, log: Log
) -> None:
    def failing(work: Participant, log: Log) -> None:
        def fail(placed: Placed, session: Session) -> Packed:
            raise RuntimeError("not now")

        work.step(on=Placed, emits=Packed, name="pack")(fail)

    first = Deployed(log, engine, failing)
    saga_id = first.start()
    first.deliver("shop.placed", "work")
    second = Deployed(log, engine, wrap, known=first.play)
    whole(second, saga_id, "completed")
    assert log.lines.count("wrapped") == 1


def test_a_dead_letter_of_the_old_name_is_resumed_under_the_new_one(
    engine: Engine, log: Log
) -> None:
    def failing(work: Participant, log: Log) -> None:
        def fail(placed: Placed, session: Session) -> Packed:
            raise RuntimeError("never")

        work.step(on=Placed, emits=Packed, name="pack")(fail)

    first = Deployed(log, engine, failing)
    saga_id = first.start()
    first.play.settle()
    assert first.row(saga_id, "work").stuck
    second = Deployed(log, engine, wrap, known=first.play)
    with Session(engine) as session, session.begin():
        (resumed,) = resume(session, saga_id, SOMEBODY, participant="work")
    assert resumed.by.startswith("dead letter")
    whole(second, saga_id, "completed")
    assert not second.row(saga_id, "work").stuck
    assert log.lines.count("wrapped") == 1


def test_a_compensation_that_is_owed_to_the_old_name_is_done_by_the_new_one(
    engine: Engine, log: Log
) -> None:
    first = Deployed(log, engine, pack, refuses=True)
    saga_id = first.start()
    first.deliver("shop.placed", "work")
    first.deliver("shop.placed", "till")
    first.deliver("saga.aborted", "work")
    second = Deployed(log, engine, wrap, refuses=True, known=first.play)
    whole(second, saga_id, "compensated")
    assert log.lines.count("unwrapped") == 1


def test_a_removed_step_that_must_be_undone_waits_visibly_and_is_undone_when_it_is_back(
    engine: Engine, log: Log
) -> None:
    first = Deployed(log, engine, pack, refuses=True)
    saga_id = first.start()
    first.deliver("shop.placed", "work")
    second = Deployed(log, engine, nothing, refuses=True, known=first.play)
    second.play.settle()
    assert "unpacked" not in log.lines
    assert second.row(saga_id, "work").stuck
    state, reason = second.runs(saga_id)["work.pack"]
    assert state == "compensation_stuck"
    assert reason is not None
    assert 'deploy it again, or what has become of it with was="pack"' in reason
    assert second.states(saga_id)["order"] != "running"

    third = Deployed(log, engine, pack, refuses=True, known=second.play)
    with Session(engine) as session, session.begin():
        assert resume(session, saga_id, SOMEBODY, participant="work")
    whole(third, saga_id, "compensated")
    assert log.lines.count("unpacked") == 1
    assert not third.row(saga_id, "work").stuck


@pytest.mark.parametrize("is_external", [False, True], ids=["plain", "external"])
def test_an_attempt_after_a_renaming_has_the_idempotency_key_of_the_one_before(
    is_external: bool, engine: Engine, log: Log
) -> None:
    """Else what was charged under the old name would be charged again."""
    keys: list[str] = []

    def calling(name: str, was: tuple[str, ...], *, fails: bool) -> Wire:
        def call(placed: Placed, *_: object) -> Packed:
            working = current()
            assert working is not None
            keys.append(working.idempotency_key)
            if fails:
                raise RuntimeError("the answer was lost")
            return Packed(placed.id)

        def wire(work: Participant, log: Log) -> None:
            step = work.step(on=Placed, emits=Packed, name=name, was=was, external=is_external)(
                call
            )
            step.compensation(log.does("unpacked"))
            if is_external:
                step.resolve(call)

        return wire

    first = Deployed(log, engine, calling("pack", (), fails=True))
    saga_id = first.start()
    message = first.deliver("shop.placed", "work")
    second = Deployed(log, engine, calling("wrap", ("pack",), fails=False), known=first.play)
    if is_external:
        # Its intent is in the journal, so the broker's second copy is no other run.
        second.play.deliver(message)
    whole(second, saga_id, "completed")
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_an_event_for_a_removed_step_is_kept_until_the_step_is_back(
    engine: Engine, log: Log
) -> None:
    first = Deployed(log, engine, pack)
    saga_id = first.start()
    second = Deployed(log, engine, nothing, known=first.play)
    second.play.settle()
    assert second.states(saga_id)["order"] == "running"
    third = Deployed(log, engine, pack, known=second.play)
    with Session(engine) as session, session.begin():
        (kept,) = [
            one
            for one in quarantine.list_messages(session)
            if saga_id.hex in one.body.decode().replace("-", "")
        ]
        assert "no handler of service work takes 'shop.placed'" in kept.reason
        quarantine.redrive(session, kept.id)
    whole(third, saga_id, "completed")


def test_a_removed_step_that_was_undone_by_hand_lets_the_saga_end(engine: Engine, log: Log) -> None:
    first = Deployed(log, engine, pack, refuses=True)
    saga_id = first.start()
    first.deliver("shop.placed", "work")
    second = Deployed(log, engine, nothing, refuses=True, known=first.play)
    second.play.settle()
    with Session(engine) as session, session.begin():
        skip_compensation(session, saga_id, "pack", SOMEBODY, participant="work")
    whole(second, saga_id, "compensated")


@pytest.mark.parametrize("refuses", [False, True], ids=["completes", "aborts"])
def test_events_and_journal_rows_of_an_older_version_are_read_by_the_upcaster(
    refuses: bool, engine: Engine, log: Log
) -> None:
    first = Deployed(log, engine, pack)
    saga_id = first.start()
    first.deliver("shop.placed", "work")
    seen: list[Any] = []

    def pack_with_money(work: Participant, log: Log) -> None:
        step = work.step(on=PlacedInMoney, emits=Packed, name="pack")(log.does("packed", Packed))
        step.compensation(lambda placed, packed, session: seen.append(placed))

    second = Deployed(log, engine, pack_with_money, refuses, PlacedInMoney, 2, known=first.play)
    whole(second, saga_id, "compensated" if refuses else "completed")
    assert seen == ([PlacedInMoney("o1", "EUR")] if refuses else [])


def test_a_step_that_was_added_runs_for_what_has_not_come_yet(engine: Engine, log: Log) -> None:
    def pack_and_thank(work: Participant, log: Log) -> None:
        pack(work, log)
        work.step(on=Paid, name="thank")(log.does("thanked")).compensation(log.does("unthanked"))

    first = Deployed(log, engine, pack)
    saga_id = first.start()
    first.deliver("shop.placed", "work")
    second = Deployed(log, engine, pack_and_thank, known=first.play)
    whole(second, saga_id, "completed")
    assert sorted(log.lines) == ["completed", "packed", "paid", "thanked"]


def test_a_compensation_that_was_removed_leaves_the_saga_stuck_with_what_to_do(
    engine: Engine, log: Log
) -> None:
    def forgetful(work: Participant, log: Log) -> None:
        work.step(on=Placed, emits=Packed, name="pack")(log.does("packed", Packed))

    first = Deployed(log, engine, pack, refuses=True)
    saga_id = first.start()
    first.deliver("shop.placed", "work")
    second = Deployed(log, engine, forgetful, refuses=True, known=first.play)
    second.play.settle()
    state, reason = second.runs(saga_id)["work.pack"]
    assert state == "compensation_stuck"
    assert reason is not None
    assert "write one, or say nothing_to_undo" in reason
    third = Deployed(log, engine, pack, refuses=True, known=second.play)
    with Session(engine) as session, session.begin():
        resume(session, saga_id, SOMEBODY, participant="work")
    whole(third, saga_id, "compensated")
    assert log.lines.count("unpacked") == 1


@pytest.mark.parametrize("seed", range(16))
def test_whichever_version_handles_what_while_both_run_the_saga_ends_whole(
    seed: int, engine: Engine, log: Log
) -> None:
    """A rolling deployment that renames a step and the deciding join, with duplicates; at its end
    only the new version runs, and somebody resumes what the old one could not do."""
    random = Random(seed)
    refuses = seed % 2 == 1
    first = Deployed(log, engine, pack, refuses)
    saga_id = first.start()
    second = Deployed(log, engine, wrap, refuses, known=first.play)
    second.order = renamed_join(second, log)
    second.play.receivers.update(Choreography({second.order: engine}).receivers)
    for _ in range(random.randint(2, 25)):
        waiting = list(second.play.collect())
        if not waiting:
            break
        again = [one for one in second.play.delivered if one.handler is None]
        message = random.choice(again if again and random.random() < 0.3 else waiting)
        side = random.choice([first, second])
        side.play.deliver(message)
        if message in second.play.waiting:
            second.play.waiting.remove(message)
        second.play.delivered.append(message)
    second.play.settle()
    with Session(engine) as session, session.begin():
        resume(session, saga_id, SOMEBODY)
    for message in [one for one in second.play.delivered if one.handler is None]:
        second.play.deliver(message)
    whole(second, saga_id, "compensated" if refuses else "completed")
    packed, unpacked = (
        log.lines.count(f"{un}packed") + log.lines.count(f"{un}wrapped") for un in ("", "un")
    )
    assert packed <= 1
    assert log.lines.count("completed") == (0 if refuses else 1)
    assert unpacked == (packed if refuses else 0)
    assert log.lines.count("paid") == (0 if refuses else 1)
    assert not any(second.row(saga_id, name).stuck for name in ("order", "work", "till"))
