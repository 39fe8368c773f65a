"""What is owed is sent when it is due, by one of many sweepers, and again if nothing is heard."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text

from outbox import pending
from outbox.bell import Bell
from outbox.pending import Owed, PendingDelivery
from outbox.sweeper import Sweeper, SweepSettings
from tests.receiving import Placed, Subscriber, now

HOUR = timedelta(hours=1)
OFTEN = SweepSettings(shortest=timedelta(milliseconds=10), longest=timedelta(milliseconds=50))


@pytest.fixture
def billing(migrated_engine: Engine) -> Subscriber:
    return Subscriber(migrated_engine)


@pytest.fixture
def sweeper(billing: Subscriber) -> Callable[..., Sweeper]:
    def make(send: Callable[[Sequence[PendingDelivery]], None], **options: object) -> Sweeper:
        options.setdefault("settings", OFTEN)
        return Sweeper("billing", billing.engine, send, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def running() -> Iterator[Callable[[Sweeper], Sweeper]]:
    started: list[Sweeper] = []

    def start(sweeper: Sweeper) -> Sweeper:
        started.append(sweeper)
        sweeper.start()
        return sweeper

    yield start
    for sweeper in started:
        sweeper.stop()


def owe(
    billing: Subscriber, what: str, delay: timedelta = timedelta(0), service: str = "billing"
) -> None:
    owed = Owed(service, "h", uuid4(), "order.placed", what.encode())
    with billing.session() as session, session.begin():
        pending.owe(session, owed, "retry", delay=delay)


class Sent(list[str]):
    """Collects what is sent; the test can wait for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()

    def __call__(self, batch: Sequence[PendingDelivery]) -> None:
        with self.changed:
            self.extend(owed.body.decode() for owed in batch)
            self.changed.notify_all()

    def wait_for(self, *expected: str, seconds: float = 10) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(expected) <= set(self), seconds), self


def test_what_is_due_is_sent_in_order_and_what_is_not_is_left(
    billing: Subscriber, sweeper: Callable[..., Sweeper]
) -> None:
    owe(billing, "later", HOUR)
    owe(billing, "second", -timedelta(seconds=1))
    owe(billing, "first", -timedelta(seconds=2))
    sent = Sent()

    assert sweeper(sent).sweep() == 2

    assert sent == ["first", "second"]


def test_what_was_sent_is_sent_again_ever_less_often_until_it_is_settled(
    billing: Subscriber, sweeper: Callable[..., Sweeper]
) -> None:
    owe(billing, "x")
    sent = Sent()
    waits = []
    for _ in range(5):
        sweeper(sent, settings=SweepSettings(resend_cap=timedelta(minutes=5))).sweep()
        (row,) = billing.rows(
            "SELECT next_attempt_at - clock_timestamp() AS wait FROM outbox.pending_delivery"
        )
        waits.append(round(row.wait.total_seconds() / 60))
        billing.run("UPDATE outbox.pending_delivery SET next_attempt_at = now()")

    assert sent == ["x"] * 5
    assert waits == [1, 2, 4, 5, 5]


def test_the_deliveries_of_another_service_are_not_touched(
    billing: Subscriber, sweeper: Callable[..., Sweeper]
) -> None:
    owe(billing, "theirs", service="shipping")

    assert sweeper(Sent()).sweep() == 0


def test_two_sweepers_do_not_send_the_same(
    billing: Subscriber, sweeper: Callable[..., Sweeper]
) -> None:
    for number in range(4):
        owe(billing, str(number))
    settings = SweepSettings(batch=2)
    sent = Sent()
    with billing.session() as other, other.begin():
        other.execute(text("SELECT 1 FROM outbox.pending_delivery LIMIT 2 FOR UPDATE"))
        sweeper(sent, settings=settings).sweep()
        sweeper(sent, settings=settings).sweep()
    sweeper(sent, settings=settings).sweep()

    assert sorted(sent) == ["0", "1", "2", "3"]


def test_what_the_broker_did_not_take_is_sent_when_it_does(
    billing: Subscriber, sweeper: Callable[..., Sweeper], running: Callable[[Sweeper], Sweeper]
) -> None:
    owe(billing, "x")
    sent = Sent()
    failures = iter([ConnectionError("no broker"), ConnectionError("no broker")])

    def send(batch: Sequence[PendingDelivery]) -> None:
        for error in failures:
            raise error
        sent(batch)

    running(sweeper(send))

    sent.wait_for("x")


def test_a_database_that_is_away_does_not_end_it(
    billing: Subscriber,
    sweeper: Callable[..., Sweeper],
    running: Callable[[Sweeper], Sweeper],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent = Sent()
    billing.run("ALTER TABLE outbox.pending_delivery RENAME TO away")
    with caplog.at_level(logging.WARNING, "outbox.sweeper"):
        running(sweeper(sent))
        while "sweeping billing failed" not in caplog.text:
            threading.Event().wait(0.01)
    billing.run("ALTER TABLE outbox.away RENAME TO pending_delivery")
    owe(billing, "x")

    sent.wait_for("x")


def test_what_is_due_in_a_moment_is_not_waited_for_longer(
    billing: Subscriber, sweeper: Callable[..., Sweeper], running: Callable[[Sweeper], Sweeper]
) -> None:
    sent = Sent()
    slow = SweepSettings(shortest=timedelta(hours=1), longest=timedelta(hours=1))
    owe(billing, "soon", timedelta(milliseconds=300))

    running(sweeper(sent, settings=slow))

    sent.wait_for("soon")


def test_a_handler_that_schedules_for_now_wakes_the_sweeper(
    billing: Subscriber, sweeper: Callable[..., Sweeper], running: Callable[[Sweeper], Sweeper]
) -> None:
    bell, sent = Bell(), Sent()
    slow = SweepSettings(shortest=timedelta(hours=1), longest=timedelta(hours=1))
    done_once = threading.Event()
    running(sweeper(sent, settings=slow, bell=bell, chores=done_once.set))
    assert done_once.wait(10)
    owe(billing, "unheard")  # by another process; nobody rings for it

    @billing.service.on(Placed)
    def bill(event: Placed, session: object) -> None:
        pending.schedule(session, "billing", "billing.remind", billing.placed("now"))  # type: ignore[arg-type]

    billing.receiver(on_due=bell.ring).receive(billing.placed().body)

    sent.wait_for("unheard")
    assert len(sent) == 2


def test_nobody_is_woken_for_what_was_rolled_back_or_is_due_later(billing: Subscriber) -> None:
    rings: list[int] = []

    @billing.service.on(Placed)
    def bill(event: Placed, session: object) -> None:
        due_at = None if event.order == "fails" else now() + HOUR
        pending.schedule(session, "billing", "billing.remind", billing.placed(), due_at)  # type: ignore[arg-type]
        if event.order == "fails":
            raise ValueError

    receiver = billing.receiver(on_due=lambda: rings.append(1))
    for order in ("fails", "later"):
        receiver.receive(billing.placed(order).body)

    assert rings == []


def test_it_stops_when_told_to(
    sweeper: Callable[..., Sweeper], running: Callable[[Sweeper], Sweeper]
) -> None:
    slow = SweepSettings(shortest=timedelta(hours=1), longest=timedelta(hours=1))
    before = threading.active_count()
    started = running(sweeper(Sent(), settings=slow))

    started.stop(timeout=10)

    assert threading.active_count() == before


def test_chores_that_fail_do_not_end_it(
    billing: Subscriber, sweeper: Callable[..., Sweeper], running: Callable[[Sweeper], Sweeper]
) -> None:
    def fail() -> None:
        raise RuntimeError("no rights")

    sent = Sent()
    owe(billing, "x")
    running(sweeper(sent, chores=fail))

    sent.wait_for("x")
