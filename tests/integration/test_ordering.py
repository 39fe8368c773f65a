"""Ordered keys: each handler gets the events of a key in the order of their commits, and once."""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import dead_letters, holes, pending, quarantine
from outbox.dead_letters import Matching
from outbox.envelope import decode
from outbox.events import Registry
from outbox.holes import Forgotten
from outbox.ordering import GIVE_UP
from outbox.receive import Receiver
from outbox.service import RetryPolicy, Service
from outbox.work import Outcome

NOW = timedelta(0)
EVENTS = text(
    "SELECT type, key, key_seq, body FROM outbox.outbox_event WHERE position > :after ORDER BY position"
)


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@dataclass(frozen=True)
class Moved:
    account: str
    amount: int


@dataclass
class Bank:
    """A publisher of ordered events and a subscriber that books them, on one database."""

    engine: Engine
    failures: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many more times the booking of (account, amount) fails."""

    def __post_init__(self) -> None:
        self.registry = Registry()
        self.registry.event("money.moved", key="account", ordered=True)(Moved)
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE TABLE IF NOT EXISTS booking "
                    "(at bigint GENERATED ALWAYS AS IDENTITY, account text, amount int)"
                )
            )
            kept = (
                "pending_delivery, dead_letter, quarantine, inbox_order, inbox_busy_order, outbox_key, "
                "outbox_busy_key, awaited"
            )
            tables = ", ".join(f"outbox.{name}" for name in kept.split(", "))
            connection.execute(text(f"TRUNCATE booking, {tables}"))
            top = connection.execute(text("SELECT max(position) FROM outbox.outbox_event"))
            self.after = top.scalar() or 0
        self.books = Service("books", registry=self.registry)
        twice = RetryPolicy(attempts=2, first=NOW, cap=NOW)

        @self.books.on(Moved, retry=twice)
        def book(moved: Moved, session: Session) -> None:
            if self.failures[moved.account, moved.amount] > 0:
                self.failures[moved.account, moved.amount] -= 1
                raise RuntimeError("the book is shut")
            session.execute(
                text("INSERT INTO booking (account, amount) VALUES (:account, :amount)"),
                vars(moved),
            )

        self.receiver = Receiver(self.books, self.engine)

    def publish(self, account: str, count: int) -> None:
        for amount in range(1, count + 1):
            with Session(self.engine) as session, session.begin():
                self.books.publish(session, Moved(account, amount))

    def messages(self) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(EVENTS, {"after": self.after}))

    def receive(self, message: Any) -> Outcome:
        receipt = self.receiver.receive(bytes(message.body), key_seq=message.key_seq)
        return next(iter(receipt.outcomes.values()))

    def deliver_owed(self, *, due: bool = True) -> int:
        """Deliver what is owed: what is due now, or (else) everything; how many."""
        with Session(self.engine) as session:
            if due:
                wait = pending.until_due(session, "books")
                owed = pending.list_pending(session) if wait is not None and wait <= NOW else []
                at = session.execute(text("SELECT clock_timestamp()")).scalar_one()
                owed = [one for one in owed if one.next_attempt_at and one.next_attempt_at <= at]
            else:
                owed = pending.list_pending(session)
        for one in owed:
            self.receiver.receive(one.body, handler=one.handler, key_seq=one.key_seq)
        return len(owed)

    def settle(self) -> None:
        while self.deliver_owed():
            pass

    def after_a_while(self, passed: timedelta = timedelta(minutes=1)) -> None:
        """So much later: what was put by is due."""
        with self.engine.begin() as connection:
            for sql in (
                "UPDATE outbox.inbox_order SET seen_at = seen_at - :passed",
                "UPDATE outbox.pending_delivery SET created_at = created_at - :passed, "
                "next_attempt_at = least(next_attempt_at, clock_timestamp())",
            ):
                connection.execute(text(sql), {"passed": passed})

    def is_named(self, message: Any, *, is_gone: bool = False) -> None:
        """A roll has named it; and its source has it no more."""
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO outbox.awaited "
                    "(handler, event_id, service, type, log, lane, position, next_ask_at, gone_at) "
                    "VALUES (:handler, :id, 'books', :type, gen_random_uuid(), 0, 1, clock_timestamp(), "
                    "CASE WHEN :is_gone THEN clock_timestamp() END)"
                ),
                {
                    "is_gone": is_gone,
                    "handler": self.books.handlers[0].name,
                    "id": decode(bytes(message.body)).id,
                    "type": message.type,
                },
            )

    def forget_gone(self) -> Forgotten:
        with Session(self.engine) as session, session.begin():
            return holes.forget_gone(session, "brought over by hand")

    def booked(self) -> dict[str, list[int]]:
        booked: dict[str, list[int]] = defaultdict(list)
        with self.engine.connect() as connection:
            for row in connection.execute(text("SELECT account, amount FROM booking ORDER BY at")):
                booked[row.account].append(row.amount)
        return booked


@pytest.fixture
def bank(engine: Engine) -> Bank:
    return Bank(engine)


def decide(bank: Bank, verb: str) -> None:
    """What a person does about the dead letter of key a."""
    with Session(bank.engine) as session, session.begin():
        if verb == "redrive":
            assert dead_letters.redrive(session, Matching(key="a")) == 1
        else:
            assert dead_letters.discard(session, Matching(key="a"), "not ours") == 1


def test_events_that_come_backwards_are_handled_forwards(bank: Bank) -> None:
    bank.publish("a", 4)
    first, *later = bank.messages()
    assert [bank.receive(one) for one in reversed(later)] == [Outcome.EARLY] * 3
    assert bank.booked() == {}
    assert bank.receive(first) is Outcome.HANDLED
    bank.settle()
    assert bank.booked() == {"a": [1, 2, 3, 4]}


def test_an_early_event_uses_up_no_attempt(bank: Bank) -> None:
    bank.publish("a", 3)
    first, second, third = bank.messages()
    bank.receive(first)
    bank.receive(third)
    for _ in range(5):
        bank.deliver_owed(due=False)
    with Session(bank.engine) as session:
        (owed,) = pending.list_pending(session)
    assert (owed.reason, owed.attempts) == ("early", 0)
    bank.receive(second)
    bank.settle()
    assert bank.booked() == {"a": [1, 2, 3]}


def test_a_failing_event_holds_up_its_own_key_and_no_other(bank: Bank) -> None:
    bank.publish("a", 3)
    bank.publish("b", 2)
    bank.failures["a", 2] = 2
    outcomes = [bank.receive(one) for one in bank.messages()]
    assert outcomes == [
        Outcome.HANDLED, Outcome.RETRY, Outcome.EARLY, Outcome.HANDLED, Outcome.HANDLED,
    ]  # fmt: skip
    bank.settle()
    assert bank.booked() == {"a": [1], "b": [1, 2]}


@pytest.mark.parametrize("verb", ["redrive", "discard"])
def test_a_dead_letter_holds_up_its_key_until_a_person_has_decided(bank: Bank, verb: str) -> None:
    bank.publish("a", 4)
    bank.failures["a", 2] = 2
    for message in bank.messages():
        bank.receive(message)
    bank.settle()
    assert bank.booked() == {"a": [1]}
    decide(bank, verb)
    bank.settle()
    assert bank.booked() == {"a": [1, 2, 3, 4] if verb == "redrive" else [1, 3, 4]}


def decide_on_what_is_quarantined(bank: Bank, verb: str) -> None:
    with Session(bank.engine) as session, session.begin():
        (message,) = quarantine.list_messages(session)
        if verb == "redrive":
            assert quarantine.redrive(session, message.id)
        else:
            assert quarantine.discard(session, message.id, "not ours")


@pytest.mark.parametrize("verb", ["redrive", "discard"])
def test_a_quarantined_event_holds_up_its_key_until_a_person_has_decided(
    bank: Bank, verb: str
) -> None:
    bank.publish("a", 3)
    first, second, third = bank.messages()
    bank.receive(first)
    bank.receiver.quarantine(bytes(second.body), "odd", key_seq=second.key_seq)
    bank.receive(third)
    bank.settle()
    assert bank.booked() == {"a": [1]}
    decide_on_what_is_quarantined(bank, verb)
    bank.settle()
    assert bank.booked() == {"a": [1, 2, 3] if verb == "redrive" else [1, 3]}


def test_an_event_that_is_discarded_before_its_turn_holds_up_nothing_when_its_turn_comes(
    bank: Bank,
) -> None:
    bank.publish("a", 5)
    first, second, third, fourth, fifth = bank.messages()
    bank.receive(first)
    for odd in (third, fourth):
        bank.receiver.quarantine(bytes(odd.body), "odd", key_seq=odd.key_seq)
    bank.receive(fifth)
    with Session(bank.engine) as session, session.begin():
        for message in quarantine.list_messages(session):
            assert quarantine.discard(session, message.id, "not ours")
    bank.receive(second)
    bank.settle()
    assert bank.booked() == {"a": [1, 2, 5]}


def test_a_quarantined_event_whose_data_cannot_be_read_holds_up_its_key_only_until_it_is_discarded(
    bank: Bank,
) -> None:
    bank.publish("a", 3)
    first, second, third = bank.messages()
    broken = bytes(second.body).replace(b'"data":{', b'"data":{{')
    bank.receive(first)
    assert bank.receiver.receive(broken, key_seq=second.key_seq).refused
    bank.receive(third)
    with Session(bank.engine) as session, session.begin():
        (message,) = quarantine.list_messages(session)
        assert quarantine.discard(session, message.id, "cut off")
    bank.settle()
    assert bank.booked() == {"a": [1, 3]}


@pytest.mark.parametrize(
    "body", [b"", b"\xff{", b"[1]", b'{"source":"x"}', b'{"type":1,"data":[[[']
)
def test_what_cannot_be_read_at_all_moves_no_key_on(
    bank: Bank, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    bank.publish("a", 3)
    first, _, third = bank.messages()
    bank.receive(first)
    bank.receive(third)
    bank.receiver.receive(body, key_seq=2)
    with Session(bank.engine) as session, session.begin():
        (message,) = quarantine.list_messages(session)
        assert quarantine.discard(session, message.id, "cut off")
    bank.settle()
    assert bank.booked() == {"a": [1]}
    assert "which key that is" in caplog.text


def test_a_dead_letter_says_how_many_wait_behind_it(bank: Bank) -> None:
    bank.publish("a", 4)
    bank.publish("b", 1)
    bank.failures["a", 2] = bank.failures["b", 1] = 2
    for message in bank.messages():
        bank.receive(message)
    bank.settle()
    with Session(bank.engine) as session:
        held_up = {one.key: one.held_up for one in dead_letters.list_letters(session)}
    assert held_up == {"a": 2, "b": 0}


def test_two_sources_of_one_key_are_two_orders(bank: Bank) -> None:
    other = Service("other", registry=bank.registry)
    for source, amount in ((bank.books, 1), (other, 10), (bank.books, 2), (other, 20)):
        with Session(bank.engine) as session, session.begin():
            source.publish(session, Moved("a", amount))
    messages = bank.messages()
    assert [one.key_seq for one in messages] == [1, 1, 2, 2]
    for message in reversed(messages):
        bank.receive(message)
    bank.settle()
    booked = bank.booked()["a"]
    assert [amount for amount in booked if amount < 10] == [1, 2]
    assert [amount for amount in booked if amount >= 10] == [10, 20]


def test_a_duplicate_of_what_was_handled_is_one(bank: Bank) -> None:
    bank.publish("a", 2)
    first, second = bank.messages()
    bank.receive(first)
    assert bank.receive(first) is Outcome.DUPLICATE
    bank.receive(second)
    assert bank.receive(first) is Outcome.DUPLICATE
    assert bank.booked() == {"a": [1, 2]}


def test_a_new_subscriber_begins_with_the_first_that_it_gets_and_waits_a_moment_for_earlier_ones(
    bank: Bank,
) -> None:
    bank.publish("a", 5)
    messages = bank.messages()
    assert bank.receive(messages[3]) is Outcome.EARLY
    assert bank.receive(messages[2]) is Outcome.EARLY
    bank.after_a_while()
    bank.settle()
    assert bank.booked() == {"a": [3, 4]}
    assert bank.receive(messages[4]) is Outcome.HANDLED
    assert bank.receive(messages[0]) is Outcome.HANDLED, "late is not lost"


@pytest.mark.parametrize("verb", [None, "redrive", "discard"])
def test_the_first_event_of_a_key_holds_up_those_after_it_when_it_fails(
    bank: Bank, verb: str | None
) -> None:
    bank.publish("a", 3)
    bank.failures["a", 1] = 1 if verb is None else 2
    first, second, third = bank.messages()
    assert bank.receive(first) is Outcome.RETRY
    if verb is not None:
        bank.deliver_owed(due=False)
    assert bank.receive(third) is Outcome.EARLY
    assert bank.receive(second) is Outcome.EARLY
    bank.after_a_while()
    if verb is not None:
        bank.settle()
        assert bank.booked() == {}
        decide(bank, verb)
    bank.settle()
    assert bank.booked() == {"a": [2, 3] if verb == "discard" else [1, 2, 3]}


@pytest.mark.parametrize("verb", ["redrive", "discard"])
def test_the_first_event_of_a_key_holds_up_those_after_it_when_it_is_quarantined(
    bank: Bank, verb: str
) -> None:
    bank.publish("a", 2)
    first, second = bank.messages()
    bank.receiver.quarantine(bytes(first.body), "odd", key_seq=first.key_seq)
    assert bank.receive(second) is Outcome.EARLY
    bank.after_a_while()
    bank.settle()
    assert bank.booked() == {}
    decide_on_what_is_quarantined(bank, verb)
    bank.after_a_while()
    bank.settle()
    assert bank.booked() == {"a": [1, 2] if verb == "redrive" else [2]}


def test_the_first_event_of_a_key_holds_up_those_after_it_while_it_is_missed(bank: Bank) -> None:
    """The broker has lost it, or it lies with a worker that is busy: a roll has named it, and it is not here."""
    bank.publish("a", 2)
    first, second = bank.messages()
    bank.is_named(first)
    assert bank.receive(second) is Outcome.EARLY
    bank.after_a_while()
    bank.settle()
    assert bank.booked() == {}
    assert bank.receive(first) is Outcome.HANDLED
    bank.settle()
    assert bank.booked() == {"a": [1, 2]}


def test_a_key_begins_some_time_although_something_is_missed(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    bank.publish("a", 2)
    bank.publish("b", 1)
    _, second, of_another = bank.messages()
    bank.is_named(of_another)
    assert bank.receive(second) is Outcome.EARLY
    bank.after_a_while(GIVE_UP)
    bank.settle()
    assert bank.booked() == {"a": [2]}
    assert "are missed" in caplog.text


def test_keys_that_wait_for_what_is_gone_go_on_once_it_is_forgotten(bank: Bank) -> None:
    for account in "abc":
        bank.publish(account, 3)
    for message in bank.messages():
        if message.key_seq != 2:
            bank.receive(message)
        elif message.key != "b":
            bank.is_named(message, is_gone=message.key == "a")
        else:
            bank.receiver.quarantine(bytes(message.body), "odd", key_seq=2)
    assert bank.forget_gone() == Forgotten(1, 0), "they may only not be named yet"
    bank.after_a_while(GIVE_UP)
    assert bank.forget_gone() == Forgotten(0, 0), "one of the type is still missed"
    bank.receive(next(one for one in bank.messages() if (one.key, one.key_seq) == ("c", 2)))
    assert bank.forget_gone() == Forgotten(0, 1)
    bank.settle()
    assert bank.booked() == {"a": [1, 3], "b": [1], "c": [1, 2, 3]}


def test_the_first_event_of_a_key_begins_at_once(bank: Bank) -> None:
    bank.publish("a", 2)
    first, second = bank.messages()
    assert bank.receive(second) is Outcome.EARLY
    assert bank.receive(first) is Outcome.HANDLED
    bank.settle()
    assert bank.booked() == {"a": [1, 2]}


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(seed=st.integers(0, 2**32), keys=st.integers(1, 3), events=st.integers(1, 6))
def test_each_key_is_in_order_however_many_work_at_it_and_whatever_fails(
    engine: Engine, seed: int, keys: int, events: int
) -> None:
    bank, random = Bank(engine), Random(seed)
    accounts = "abc"[:keys]
    for account in accounts:
        bank.publish(account, events)
        for amount in range(1, events + 1):
            bank.failures[account, amount] = random.choice((0, 0, 0, 1, 3))
    messages = bank.messages()
    messages += random.choices(messages, k=len(messages) // 2)
    random.shuffle(messages)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bank.receive, messages))
        for _ in range(200):
            # All at once, as after their time: put off, early or due, in any order.
            with Session(engine) as session:
                owed = list(pending.list_pending(session, limit=1000))
            random.shuffle(owed)
            list(
                pool.map(
                    lambda one: bank.receiver.receive(
                        one.body, handler=one.handler, key_seq=one.key_seq
                    ),
                    owed,
                )
            )
            with Session(engine) as session, session.begin():
                redriven = dead_letters.redrive(session, Matching())
            if not owed and not redriven:
                break
    whole = list(range(1, events + 1))
    assert bank.booked() == dict.fromkeys(accounts, whole)
