"""Receiving several messages in one transaction: nothing may come out otherwise than one by one."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import pending
from outbox.envelope import decode
from outbox.errors import ConfigurationError
from outbox.intake import Incoming
from outbox.receive import Outcome, Receipt
from outbox.service import Delivery, Handler, RetryPolicy
from tests.receiving import AT_ONCE, Placed, Subscriber
from tests.workers import eventually

BILL = "billing.bill"


@pytest.fixture
def billing(migrated_engine: Engine) -> Subscriber:
    return Subscriber(migrated_engine)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def bill_by_order(billing: Subscriber, refused: tuple[str, ...] = ()) -> Counter[str]:
    """A handler that writes its order and fails for some; returns how often it ran for each."""
    runs: Counter[str] = Counter()

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        runs[event.order] += 1
        billing.effect(session, event.order)
        if event.order in refused:
            raise ValueError("refused")

    return runs


def messages(billing: Subscriber, *orders: str) -> list[Incoming]:
    return [Incoming(billing.placed(order).body) for order in orders]


def outcomes(receipts: list[Receipt]) -> list[Outcome]:
    return [receipt.outcomes[BILL] for receipt in receipts]


def transactions(billing: Subscriber) -> int:
    rows = billing.rows("SELECT count(DISTINCT xmin::text) AS count FROM effect")
    return int(rows[0].count)


# ---- together ----


def test_a_batch_is_one_transaction(billing: Subscriber) -> None:
    bill_by_order(billing)

    receipts = billing.receiver().take_in_batch(messages(billing, "a", "b", "c"))

    assert outcomes(receipts) == [Outcome.HANDLED] * 3
    assert (billing.effects, transactions(billing)) == (["a", "b", "c"], 1)
    assert len(billing.inbox) == 3


def test_each_event_is_handled_as_the_cause_of_what_its_handler_publishes(
    billing: Subscriber,
) -> None:
    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        billing.service.publish(session, Placed(order=f"after {event.order}"))

    placed = [billing.placed("a"), billing.placed("b")]
    billing.receiver().take_in_batch([Incoming(one.body) for one in placed])

    published = billing.rows(
        "SELECT convert_from(body, 'utf8')::jsonb ->> 'causationid' AS cause FROM outbox.outbox_event"
    )
    assert {row.cause for row in published} == {str(one.id) for one in placed}


def test_events_of_a_key_keep_the_order_they_came_in(billing: Subscriber) -> None:
    seen: list[tuple[str, int]] = []

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        seen.append((event.order, event.total))

    mixed = [Placed(order=order, total=n) for n in range(5) for order in "cab"]
    billing.receiver().take_in_batch([Incoming(billing.envelope(one).body) for one in mixed])

    assert seen == [(order, n) for order in "abc" for n in range(5)]


# ---- what does not go together ----


def test_one_that_fails_hurts_no_other(billing: Subscriber) -> None:
    runs = bill_by_order(billing, refused=("b",))

    receipts = billing.receiver().take_in_batch(messages(billing, "a", "b", "c"))

    assert outcomes(receipts) == [Outcome.HANDLED, Outcome.RETRY, Outcome.HANDLED]
    assert billing.effects == ["a", "c"]
    assert [owed.attempts for owed in billing.owed] == [1], "the batch itself was no attempt"
    assert runs["b"] == 2


def test_what_the_inbox_has_is_left_out(billing: Subscriber) -> None:
    runs = bill_by_order(billing)
    before, after = messages(billing, "a", "b")
    receiver = billing.receiver()
    receiver.take_in(before)

    receipts = receiver.take_in_batch([before, after])

    assert outcomes(receipts) == [Outcome.DUPLICATE, Outcome.HANDLED]
    assert runs == {"a": 1, "b": 1}


def test_a_second_copy_in_the_batch_is_a_duplicate(billing: Subscriber) -> None:
    runs = bill_by_order(billing)
    first, other = messages(billing, "a", "b")

    receipts = billing.receiver().take_in_batch([first, replace(first), other])

    assert outcomes(receipts) == [Outcome.HANDLED, Outcome.DUPLICATE, Outcome.HANDLED]
    assert runs == {"a": 1, "b": 1}


def test_another_content_under_the_same_id_is_quarantined(billing: Subscriber) -> None:
    bill_by_order(billing)
    genuine, other = messages(billing, "a", "b")
    forged = Incoming(genuine.body.replace(b'"a"', b'"z"'))

    receipts = billing.receiver().take_in_batch([genuine, forged, other])

    assert outcomes(receipts) == [Outcome.HANDLED, Outcome.QUARANTINED, Outcome.HANDLED]
    assert billing.effects == ["a", "b"]


def test_what_is_owed_or_parked_is_left_out(billing: Subscriber) -> None:
    runs = bill_by_order(billing, refused=("owed", "parked"))
    owed, parked, new = messages(billing, "owed", "parked", "new")
    receiver = billing.receiver()
    for message in (owed, parked):
        receiver.take_in(message)
    for _ in range(AT_ONCE.attempts - 1):
        receiver.take_in(replace(parked, handler=BILL))
    assert (len(billing.owed), len(billing.dead)) == (1, 1)
    runs.clear()

    receipts = receiver.take_in_batch([owed, parked, new])

    assert outcomes(receipts) == [Outcome.OWED, Outcome.PARKED, Outcome.HANDLED]
    assert runs == {"new": 1}


def test_what_was_redelivered_is_counted_first_and_runs_alone(billing: Subscriber) -> None:
    owed_meanwhile: dict[str, list[Any]] = {}

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        owed_meanwhile[event.order] = billing.owed
        billing.effect(session, event.order)

    again, first, second = messages(billing, "again", "first", "second")
    billing.receiver().take_in_batch([replace(again, redelivered=True), first, second])

    assert {order: len(owed) for order, owed in owed_meanwhile.items()} == {
        "again": 1,
        "first": 0,
        "second": 0,
    }
    assert transactions(billing) == 2


def test_each_event_of_an_ordered_type_has_a_transaction_of_its_own(billing: Subscriber) -> None:
    class Changed(Placed): ...

    billing.registry.event("order.changed", key="order", ordered=True)(Changed)

    @billing.service.on(Placed, Changed, name=BILL)
    def bill(event: Placed, session: Session) -> None:
        billing.effect(session, f"{type(event).__name__} {event.order} {event.total}")

    def changed(order: str, number: int) -> Incoming:
        body = billing.envelope(Changed(order=order, total=number)).body
        return Incoming(body, key_seq=number)

    placed = messages(billing, "a", "b", "c")
    batch = [placed[0], changed("a", 1), changed("a", 2), placed[1], changed("b", 1), placed[2]]
    receipts = billing.receiver().take_in_batch(batch)

    assert outcomes(receipts) == [Outcome.HANDLED] * 6
    rows = billing.rows("SELECT what, xmin::text AS xid FROM effect")
    together = {row.xid for row in rows if row.what.startswith("Placed")}
    alone = [row.xid for row in rows if row.what.startswith("Changed")]
    assert len(together) == 1
    assert len({*together, *alone}) == 1 + 3


def test_what_cannot_be_read_is_quarantined_and_the_others_are_handled(billing: Subscriber) -> None:
    bill_by_order(billing)
    good = messages(billing, "a", "b")
    wrong = billing.placed("c").body.replace(b'"order":"c"', b'"order":[]')

    receipts = billing.receiver().take_in_batch([Incoming(b"{"), good[0], Incoming(wrong), good[1]])

    assert receipts[0].refused is not None
    assert outcomes(receipts[1:]) == [Outcome.HANDLED, Outcome.QUARANTINED, Outcome.HANDLED]
    assert (billing.effects, transactions(billing)) == (["a", "b"], 1)


def test_a_handler_that_acts_outside_never_runs_in_a_batch(billing: Subscriber) -> None:
    def prepare(delivery: Delivery, session: Session) -> Callable[[], Any]:
        return lambda: billing.rows("SELECT 1 FROM outbox.inbox") or "called"

    def run(delivery: Delivery, session: Session) -> None:
        billing.effect(session, str(delivery.result))

    billing.service.add(
        Handler(BILL, frozenset({"order.placed"}), run, retry=AT_ONCE, prepare=prepare)
    )

    billing.receiver().take_in_batch(messages(billing, "a", "b"))

    assert transactions(billing) == 2


# ---- handlers that take the whole batch ----


def test_a_batch_handler_is_given_all_new_events_at_once(billing: Subscriber) -> None:
    calls: list[list[str]] = []

    @billing.service.on_batch(Placed)
    def bill(events: list[Placed], session: Session) -> None:
        calls.append([event.order for event in events])

    seen, *others = messages(billing, "seen", "a", "b")
    receiver = billing.receiver()
    receiver.take_in(seen)
    receipts = receiver.take_in_batch([seen, *others])

    assert calls == [["seen"], ["a", "b"]]
    assert outcomes(receipts) == [Outcome.DUPLICATE, Outcome.HANDLED, Outcome.HANDLED]


def test_a_batch_handler_that_fails_is_given_each_event_alone(billing: Subscriber) -> None:
    @billing.service.on_batch(Placed, retry=RetryPolicy(attempts=1))
    def bill(events: list[Placed], session: Session) -> None:
        for event in events:
            billing.effect(session, event.order)
        if any(event.order == "b" for event in events):
            raise ValueError("not b")

    receipts = billing.receiver().take_in_batch(messages(billing, "a", "b", "c"))

    assert outcomes(receipts) == [Outcome.HANDLED, Outcome.PARKED, Outcome.HANDLED]
    assert billing.effects == ["a", "c"]


def test_a_batch_handler_must_take_two_arguments(billing: Subscriber) -> None:
    with pytest.raises(ConfigurationError, match="must take"):

        @billing.service.on_batch(Placed)
        def bill(events: list[Placed]) -> None: ...  # type: ignore[type-var]


# ---- what is owed ----


def owe(billing: Subscriber, *orders: str) -> list[Incoming]:
    """Work scheduled for now, as the sweeper would send it."""
    envelopes = [billing.placed(order) for order in orders]
    with billing.session() as session, session.begin():
        each = [(BILL, envelope, None, timedelta(0)) for envelope in envelopes]
        pending.schedule_all(session, "billing", each)
    return [Incoming(envelope.body, handler=BILL) for envelope in envelopes]


def test_the_first_run_of_what_is_owed_shares_the_transaction(billing: Subscriber) -> None:
    bill_by_order(billing)
    batch = [*owe(billing, "a", "b"), *messages(billing, "c")]

    receipts = billing.receiver().take_in_batch(batch)

    assert outcomes(receipts) == [Outcome.HANDLED] * 3
    assert (billing.effects, transactions(billing)) == (["a", "b", "c"], 1)
    assert (billing.owed, len(billing.inbox)) == ([], 3)


@pytest.mark.parametrize("begun", ["attempts = 1", "sends = 2"])
def test_what_is_owed_and_was_begun_or_sent_before_is_counted_first_and_runs_alone(
    billing: Subscriber, begun: str
) -> None:
    attempts: dict[str, list[int]] = {}

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        attempts[event.order] = [row.attempts for row in billing.owed]
        billing.effect(session, event.order)

    batch = owe(billing, "before", "a", "b")
    before = pending_id(batch[0])
    billing.run(f"UPDATE outbox.pending_delivery SET {begun} WHERE event_id = :id", id=before)

    receipts = billing.receiver().take_in_batch(batch)

    assert outcomes(receipts) == [Outcome.HANDLED] * 3
    assert transactions(billing) == 2
    assert attempts["before"] == [2 if begun.startswith("attempts") else 1]
    assert billing.owed == []


def test_what_is_owed_no_more_is_not_run(billing: Subscriber) -> None:
    runs = bill_by_order(billing)
    batch = owe(billing, "withdrawn", "a", "b")
    withdrawn = pending_id(batch[0])
    billing.run("DELETE FROM outbox.pending_delivery WHERE event_id = :id", id=withdrawn)

    receipts = billing.receiver().take_in_batch(batch)

    assert outcomes(receipts) == [Outcome.STALE, Outcome.HANDLED, Outcome.HANDLED]
    assert runs == {"a": 1, "b": 1}


def test_what_is_owed_and_fails_is_noted_alone_and_hurts_no_other(billing: Subscriber) -> None:
    bill_by_order(billing, refused=("bad",))

    receipts = billing.receiver().take_in_batch(owe(billing, "a", "bad", "b"))

    assert outcomes(receipts) == [Outcome.HANDLED, Outcome.RETRY, Outcome.HANDLED]
    assert billing.effects == ["a", "b"]
    assert [(row.attempts, row.reason) for row in billing.owed] == [(1, "retry")]


def test_a_batch_whose_note_another_worker_has_begun_meanwhile_is_run_one_by_one(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    runs = bill_by_order(billing)
    batch = owe(billing, "begun", "a", "b")
    with billing.session() as session, session.begin():
        pending.begin_attempt(session, BILL, pending_id(batch[0]), timedelta(seconds=60))
        result = pool.submit(billing.receiver().take_in_batch, batch)
        eventually(lambda: billing.rows("""
            SELECT 1 FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock'
        """))  # fmt: skip

    assert outcomes(result.result()) == [Outcome.HANDLED] * 3
    assert (runs, transactions(billing)) == ({"begun": 1, "a": 1, "b": 1}, 3)
    assert billing.owed == []


def pending_id(message: Incoming) -> UUID:
    return decode(message.body).id


# ---- at the same time ----


def test_batches_with_the_same_owed_work_have_one_effect_each(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    bill_by_order(billing)
    receiver = billing.receiver()
    for number in range(10):
        same = owe(billing, *(f"{number}-{n}" for n in range(8)))
        shuffled = [random.Random(number + n).sample(same, len(same)) for n in range(3)]
        jobs = [pool.submit(receiver.take_in_batch, batch) for batch in shuffled]
        jobs += [pool.submit(receiver.take_in, one) for one in same]
        for job in jobs:
            job.result()

    # One that met a worker at it may be put off; whatever is still owed is sent again.
    for row in billing.owed:
        receiver.take_in(Incoming(bytes(row.body), handler=BILL))
    assert billing.effects == sorted(f"{number}-{n}" for number in range(10) for n in range(8))
    assert (billing.owed, billing.dead) == ([], [])


def test_batches_with_the_same_events_have_one_effect_each(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    bill_by_order(billing)
    receiver = billing.receiver()
    for number in range(10):
        same = messages(billing, *(f"{number}-{n}" for n in range(8)))
        shuffled = [random.Random(number + n).sample(same, len(same)) for n in range(4)]
        list(pool.map(receiver.take_in_batch, shuffled))

    assert billing.effects == sorted(f"{number}-{n}" for number in range(10) for n in range(8))
    assert (billing.owed, billing.dead) == ([], [])


def test_batches_that_lock_in_a_circle_are_run_one_by_one(
    billing: Subscriber, pool: ThreadPoolExecutor
) -> None:
    """The handler locks what no key says, so that two batches deadlock."""
    billing.run("CREATE TABLE account (name text PRIMARY KEY, sum int)")
    billing.run("INSERT INTO account VALUES ('x', 0), ('y', 0)")
    account = {"1": "x", "2": "y", "3": "y", "4": "x"}
    both_hold_one = threading.Barrier(2)
    waited: set[str] = set()

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        name = account[event.order]
        session.execute(text("UPDATE account SET sum = sum + 1 WHERE name = :n"), {"n": name})
        if event.order in {"1", "3"} - waited:
            waited.add(event.order)
            both_hold_one.wait(10)

    receiver = billing.receiver()
    batches = [messages(billing, "1", "2"), messages(billing, "3", "4")]
    results = list(pool.map(receiver.take_in_batch, batches))

    assert [outcomes(receipts) for receipts in results] == [[Outcome.HANDLED] * 2] * 2
    assert {row.sum for row in billing.rows("SELECT sum FROM account")} == {2}
    assert billing.owed == []


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_comes_out_as_it_does_one_by_one(billing: Subscriber, seed: int) -> None:
    """The same messages, in batches and alone, by two services of one database."""
    chance = random.Random(seed)
    alone = "billing.alone"

    def handler(name: str) -> Handler:
        def run(delivery: Delivery, session: Session) -> None:
            billing.effect(session, delivery.event.order, name)
            if delivery.event.order.startswith("bad"):
                raise ValueError("bad")

        return Handler(name, frozenset({"order.placed"}), run, AT_ONCE, subscribes=False)

    for name in (BILL, alone):
        billing.service.add(handler(name))
    bodies = [
        billing.placed(f"{chance.choice(['bad', 'good', 'good', 'good'])}-{n}").body
        for n in range(12)
    ]
    drawn = [chance.choice(bodies) for _ in range(30)]
    received = {BILL: billing.receiver(), alone: billing.receiver()}
    one_by_one = [received[alone].take_in(_to(received[alone], alone, body)) for body in drawn]
    in_batches: list[Receipt] = []
    at = 0
    while at < len(drawn):
        size = chance.randint(1, 8)
        batch = [_to(received[BILL], BILL, body) for body in drawn[at : at + size]]
        in_batches += received[BILL].take_in_batch(batch)
        at += size

    assert [r.outcomes[BILL] for r in in_batches] == [r.outcomes[alone] for r in one_by_one]
    effects = billing.rows("SELECT handler, what FROM effect")
    assert Counter(e.what for e in effects if e.handler == BILL) == Counter(
        e.what for e in effects if e.handler == alone
    )


def _to(receiver: Any, name: str, body: bytes) -> Incoming:
    """Let the bus deliver to *name* alone, as if the other handler were another service's."""
    handlers = receiver.service._handlers
    for handler in handlers.values():
        handlers[handler.name] = replace(handler, subscribes=handler.name == name)
    return Incoming(body)


def test_a_batch_whose_connection_is_lost_is_run_one_by_one(billing: Subscriber) -> None:
    left = [True]

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        billing.effect(session, event.order)
        if event.order == "b" and left:
            left.pop()
            pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            billing.run("SELECT pg_terminate_backend(:pid)", pid=pid)

    receipts = billing.receiver().take_in_batch(messages(billing, "a", "b", "c"))

    assert outcomes(receipts) == [Outcome.HANDLED] * 3
    assert billing.effects == ["a", "b", "c"]


def test_a_batch_that_waits_too_long_for_a_key_is_put_off_for_that_key_alone(
    billing: Subscriber,
) -> None:
    bill_by_order(billing)
    billing.settings = replace(
        billing.settings,
        transaction=replace(billing.settings.transaction, lock=timedelta(milliseconds=200)),
    )
    held, free = messages(billing, "held", "free")
    envelope = billing.placed("held")
    held = Incoming(envelope.body)
    with billing.session() as other:
        other.execute(
            text("INSERT INTO outbox.inbox (event_id, handler, digest) VALUES (:id, :h, :d)"),
            {"id": envelope.id, "h": BILL, "d": envelope.digest},
        )
        receipts = billing.receiver().take_in_batch([held, free])
        other.rollback()

    assert outcomes(receipts) == [Outcome.BUSY, Outcome.HANDLED]
    assert billing.effects == ["free"]
    assert pending.EVERY_HANDLER not in {owed.handler for owed in billing.owed}
