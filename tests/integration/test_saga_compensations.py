"""A compensation that fails, hangs or kills its worker: its own attempts, then stuck, and the others go on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.receive import ReceiveSettings
from outbox.service import RetryPolicy
from outbox.work import TransactionLimits
from saga import Participant
from saga.operating import Operator, resume
from tests.payments import Killed
from tests.sagas import OrderCreated, Shop

SHORT = timedelta(milliseconds=400)
AT_ONCE = timedelta(0)


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    with shared_engine.begin() as connection:
        connection.execute(text("CREATE TABLE shelf (id int PRIMARY KEY)"))
        connection.execute(text("INSERT INTO shelf VALUES (1)"))
    return shared_engine


@pytest.fixture
def shop(engine: Engine) -> Shop:
    shop = Shop(engine)
    shop.run("DELETE FROM outbox.dead_letter")
    shop.run("DELETE FROM outbox.pending_delivery")
    return shop


def aborted_with(shop: Shop, participant: Participant) -> UUID:
    """A saga in which *participant* and users have acted, and which shipping has aborted."""
    shop.participants = (*shop.participants, participant)
    shop.reset()
    saga_id = shop.start("shipping")
    for each in (participant.name, "users", "shipping"):
        shop.deliver("order.created", each)
    return saga_id


def with_compensation(
    shop: Shop, undo: Callable[[Session], None], retry: RetryPolicy | None = None
) -> Participant:
    careful = Participant("careful", registry=shop.registry, retry=RetryPolicy(attempts=1))

    @careful.step(on=OrderCreated, compensation_retry=retry)
    def act(created: OrderCreated, session: Session) -> None: ...

    @act.compensation
    def put_back(created: OrderCreated, session: Session) -> None:
        undo(session)

    return careful


def stuck_reason(shop: Shop, saga_id: UUID) -> str:
    (row,) = shop.rows(
        "SELECT reason FROM outbox.saga_step WHERE saga_id = :id "
        "AND participant = 'careful' AND state = 'compensation_stuck'",
        id=saga_id,
    )
    return str(row.reason)


def go_on(shop: Shop, saga_id: UUID) -> None:
    with Session(shop.engine) as session, session.begin():
        resume(session, saga_id, Operator("ana", "mended"))
    shop.play.settle()
    assert set(shop.states(saga_id).values()) == {"compensated"}


@pytest.mark.parametrize(("failures", "state"), [(3, "compensated"), (4, "compensating stuck")])
def test_a_compensation_has_a_budget_of_its_own_beside_that_of_its_step(
    shop: Shop, failures: int, state: str
) -> None:
    left = failures

    def undo(_session: Session) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ConnectionError("no answer")

    policy = RetryPolicy(attempts=4, first=AT_ONCE, cap=AT_ONCE)
    saga_id = aborted_with(shop, with_compensation(shop, undo, policy))
    shop.play.settle()
    assert shop.states(saga_id)["careful"] == state
    if left < 0:
        return
    assert shop.rows("SELECT attempts FROM outbox.dead_letter")[0].attempts == 4
    go_on(shop, saga_id)


def test_between_two_attempts_a_compensation_waits_longer_each_time(shop: Shop) -> None:
    def undo(_session: Session) -> None:
        raise ConnectionError("no answer")

    policy = RetryPolicy(attempts=5, first=timedelta(hours=1), cap=timedelta(days=9))
    saga_id = aborted_with(shop, with_compensation(shop, undo, policy))
    bounds: list[tuple[int, bool]] = []
    shop.deliver("saga.aborted", "careful")
    for attempt in (1, 2, 3):
        due = next(one for one in shop.play.collect() if one.handler == "careful.act.compensation")
        shop.play.deliver(due)
        (row,) = shop.rows(
            "SELECT attempts, error, next_attempt_at - clock_timestamp() AS wait "
            "FROM outbox.pending_delivery WHERE handler = 'careful.act.compensation'"
        )
        assert row.error == "ConnectionError: no answer"
        bounds.append((row.attempts, row.wait <= timedelta(hours=2 ** (attempt - 1))))
    assert bounds == [(1, True), (2, True), (3, True)]
    assert shop.states(saga_id)["careful"] == "compensating"


def waits_for_a_lock(session: Session) -> None:
    session.execute(text("SELECT 1 FROM shelf FOR UPDATE"))


def does_not_return_from_a_statement(session: Session) -> None:
    session.execute(text("SELECT pg_sleep(60)"))


def does_nothing_in_its_transaction_for_too_long(session: Session) -> None:
    ended = text("SELECT 1 FROM pg_stat_activity WHERE pid = :pid")
    pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
    engine = session.get_bind().engine
    with engine.connect() as other:
        while other.execute(ended, {"pid": pid}).scalar():
            other.rollback()
    session.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("hang", "limits", "says"),
    [
        (waits_for_a_lock, TransactionLimits(lock=SHORT), "lock timeout"),
        (
            does_not_return_from_a_statement,
            TransactionLimits(statement=SHORT),
            "statement timeout",
        ),
        (
            does_nothing_in_its_transaction_for_too_long,
            TransactionLimits(idle=SHORT),
            "idle-in-transaction timeout",
        ),
    ],
    ids=["lock", "statement", "idle"],
)
def test_a_compensation_that_hangs_is_ended_and_in_the_end_stuck_while_the_others_go_on(
    shop: Shop, hang: Callable[[Session], None], limits: TransactionLimits, says: str
) -> None:
    shop.settings = ReceiveSettings(tries=1, transaction=limits)
    is_broken = True

    def undo(session: Session) -> None:
        if is_broken:
            hang(session)

    retry = RetryPolicy(attempts=2, first=AT_ONCE, cap=AT_ONCE)
    saga_id = aborted_with(shop, with_compensation(shop, undo, retry))
    with ExitStack() as stack:
        if hang is waits_for_a_lock:
            holder: Any = stack.enter_context(shop.engine.begin())
            holder.execute(text("SELECT 1 FROM shelf FOR UPDATE"))
        shop.play.settle()
    states = shop.states(saga_id)
    assert states["careful"] == "compensating stuck"
    assert states["users"] == "compensated"
    assert says in stuck_reason(shop, saga_id)
    is_broken = False
    go_on(shop, saga_id)


def test_a_compensation_that_kills_its_worker_each_time_is_stuck_with_that_as_its_reason(
    shop: Shop,
) -> None:
    is_broken = True

    def undo(_session: Session) -> None:
        if is_broken:
            raise Killed

    retry = RetryPolicy(attempts=2, first=AT_ONCE, cap=AT_ONCE)
    saga_id = aborted_with(shop, with_compensation(shop, undo, retry))
    deaths = 0
    while shop.play.collect():
        try:
            shop.play.deliver(shop.play.waiting[0])
        except Killed:
            deaths += 1
    assert deaths == 2
    assert "NeverFinished" in stuck_reason(shop, saga_id)
    assert shop.states(saga_id)["users"] == "compensated"
    is_broken = False
    go_on(shop, saga_id)
