"""Receiving one message: what is committed, what is owed, and what is kept for a person."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import attempt, dead_letters, pending, quarantine
from outbox.errors import ConfigurationError
from outbox.receive import Outcome, ReceiveSettings
from outbox.service import Delivery, Handler, RetryPolicy
from outbox.work import Busy, Work
from tests.receiving import AT_ONCE, Placed, Subscriber, now

BILL = "billing.bill"


@pytest.fixture
def billing(migrated_engine: Engine) -> Subscriber:
    return Subscriber(migrated_engine)


def failing(billing: Subscriber, *, name: str = "bill") -> None:
    def bill(event: Placed, session: Session) -> None:
        billing.effect(session, "half done")
        raise ValueError("no account\x00 for \ud800 this")

    bill.__name__ = name
    billing.service.on(Placed)(bill)


# ---- the effect ----


def test_an_event_is_handled_and_its_effect_committed(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    envelope = billing.placed()

    receipt = billing.receive(envelope)

    assert receipt.outcomes == {BILL: Outcome.HANDLED}
    assert billing.effects == ["billed"]
    assert billing.inbox == [(envelope.id, BILL)]
    assert billing.owed == []


def test_a_second_delivery_has_no_second_effect(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    envelope = billing.placed()

    billing.receive(envelope)
    receipt = billing.receive(envelope)

    assert receipt.outcomes == {BILL: Outcome.DUPLICATE}
    assert billing.effects == ["billed"]


def test_each_handler_of_a_type_has_the_event_once(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    billing.service.on(Placed, name="billing.count")(billing.write("counted"))
    envelope = billing.placed()

    for _ in range(2):
        billing.receive(envelope)

    assert billing.effects == ["billed", "counted"]


def test_a_handler_that_fails_leaves_the_effect_of_the_other(billing: Subscriber) -> None:
    failing(billing)
    billing.service.on(Placed, name="billing.count")(billing.write("counted"))

    receipt = billing.receive(billing.placed())

    assert receipt.outcomes == {BILL: Outcome.RETRY, "billing.count": Outcome.HANDLED}
    assert billing.effects == ["counted"]


def test_the_handler_is_given_the_payload_and_its_attempt(billing: Subscriber) -> None:
    seen: list[Delivery] = []
    billing.service.add(
        Handler(BILL, frozenset({"order.placed"}), run=lambda delivery, _: seen.append(delivery))
    )
    envelope = billing.placed("o7")

    billing.receive(envelope)

    assert seen[0].event == Placed(order="o7")
    assert (seen[0].attempt, seen[0].handler, seen[0].envelope.id) == (1, BILL, envelope.id)


@pytest.mark.parametrize("verb", ["commit", "rollback", "close"])
def test_a_handler_cannot_end_the_transaction_that_holds_its_inbox_row(
    billing: Subscriber, verb: str
) -> None:
    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        billing.effect(session, "early")
        getattr(session, verb)()

    billing.receive(billing.placed())

    assert billing.effects == []
    assert ConfigurationError.__name__ in billing.owed[0].error


def test_a_savepoint_of_the_handler_may_be_undone(billing: Subscriber) -> None:
    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        with session.begin_nested():
            billing.effect(session, "kept")
        with session.begin_nested() as savepoint:
            billing.effect(session, "undone")
            savepoint.rollback()

    billing.receive(billing.placed())

    assert billing.effects == ["kept"]


# ---- failures ----


def test_a_failure_is_rolled_back_and_owed_again(billing: Subscriber) -> None:
    failing(billing)

    receipt = billing.receive(billing.placed())

    assert receipt.outcomes == {BILL: Outcome.RETRY}
    assert billing.effects == []
    assert billing.inbox == []
    (owed,) = billing.owed
    assert (owed.attempts, owed.reason, owed.service) == (1, "retry", "billing")
    assert owed.error.startswith("ValueError: no account")


def test_the_last_failure_parks_the_delivery_with_its_traceback(billing: Subscriber) -> None:
    failing(billing)
    envelope = billing.placed()

    billing.receive(envelope)
    outcomes = [
        billing.receive(envelope, handler=BILL).outcomes[BILL] for _ in range(AT_ONCE.attempts - 1)
    ]

    assert outcomes == [Outcome.RETRY, Outcome.PARKED]
    assert billing.owed == []
    (letter,) = billing.dead
    assert (letter.attempts, letter.type, letter.key) == (3, "order.placed", "o1")
    assert "in bill" in letter.traceback
    assert bytes(letter.body) == envelope.body


def test_a_redriven_dead_letter_gets_all_its_attempts_again(billing: Subscriber) -> None:
    broken = True

    @billing.service.on(Placed, retry=RetryPolicy(attempts=1))
    def bill(event: Placed, session: Session) -> None:
        if broken:
            raise ValueError
        billing.effect(session, "billed")

    envelope = billing.placed()
    billing.receive(envelope)
    broken = False
    with billing.session() as session, session.begin():
        assert dead_letters.redrive(session, dead_letters.Matching(handler=BILL)) == 1

    assert (billing.owed[0].attempts, billing.owed[0].reason) == (0, "redrive")
    assert billing.receive(envelope, handler=BILL).outcomes == {BILL: Outcome.HANDLED}
    assert billing.effects == ["billed"]
    assert (billing.dead, billing.owed) == ([], [])


def test_a_copy_of_a_parked_delivery_waits_for_the_person_too(billing: Subscriber) -> None:
    billing.service.on(Placed, retry=RetryPolicy(attempts=1))(_raise)
    envelope = billing.placed()
    billing.receive(envelope)

    for redelivered in (False, True):
        receipt = billing.receive(envelope, redelivered=redelivered)
        assert receipt.outcomes == {"billing._raise": Outcome.PARKED}
    assert (len(billing.dead), billing.owed) == (1, [])


def test_a_copy_of_a_delivery_that_is_owed_does_not_run_before_its_time(
    billing: Subscriber,
) -> None:
    failing(billing)
    envelope = billing.placed()
    billing.receive(envelope)

    assert billing.receive(envelope).outcomes == {BILL: Outcome.OWED}
    assert billing.owed[0].attempts == 1


def test_a_message_whose_note_was_withdrawn_is_not_run(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))

    receipt = billing.receive(billing.placed(), handler=BILL)

    assert receipt.outcomes == {BILL: Outcome.STALE}
    assert billing.effects == []


def test_a_delivery_settled_between_its_note_and_its_run_is_not_run(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    envelope = billing.placed()
    work = Work(billing.service, billing.service.handlers[0], envelope, addressed=True)
    with billing.session() as session, session.begin():
        pending.schedule(session, "billing", BILL, envelope)
        assert attempt.note(session, work) == pending.Noted(1)
        pending.withdraw(session, BILL, envelope.id)
        outcome = attempt.deliver(session, work, Placed(order="o1"), 1, noted=True)

    assert (outcome, billing.effects) == (Outcome.STALE, [])


def test_the_exhausted_hook_writes_in_the_transaction_that_parks(billing: Subscriber) -> None:
    def exhausted(delivery: Delivery, session: Session, error: BaseException) -> None:
        assert len(session.execute(text("SELECT 1 FROM outbox.dead_letter")).all()) == 1
        billing.effect(session, f"gave up on {delivery.event.order}: {error}")

    billing.service.on(Placed, retry=RetryPolicy(attempts=1), exhausted=exhausted)(_raise)

    billing.receive(billing.placed("o3"))

    assert billing.effects == ["gave up on o3: no"]


def test_a_delivery_whose_hook_fails_is_not_lost_but_tried_again(billing: Subscriber) -> None:
    broken = True

    def exhausted(delivery: Delivery, session: Session, error: BaseException) -> None:
        billing.effect(session, f"gave up: {type(error).__name__}")
        if broken:
            raise RuntimeError("hook")

    name = "billing._raise"
    policy = RetryPolicy(attempts=1, first=timedelta(0), cap=timedelta(0))
    billing.service.on(Placed, retry=policy, exhausted=exhausted)(_raise)
    envelope = billing.placed()

    assert billing.receive(envelope).outcomes == {name: Outcome.RETRY}
    assert (billing.dead, billing.effects) == ([], [])

    broken = False
    assert billing.receive(envelope, handler=name).outcomes == {name: Outcome.PARKED}
    assert billing.effects == ["gave up: NeverFinished"]
    assert "hook" in billing.dead[0].error


def test_a_hook_that_finds_another_worker_at_it_is_asked_again_and_costs_no_attempt(
    billing: Subscriber,
) -> None:
    is_busy = True

    def exhausted(delivery: Delivery, session: Session, error: BaseException) -> None:
        if is_busy:
            raise Busy("someone holds the row")
        billing.effect(session, f"gave up: {error}")

    name = "billing._raise"
    billing.service.on(Placed, retry=RetryPolicy(attempts=1), exhausted=exhausted)(_raise)
    envelope = billing.placed()

    assert billing.receive(envelope).outcomes == {name: Outcome.BUSY}
    assert (billing.dead, [owed.attempts for owed in billing.owed]) == ([], [0])

    is_busy = False
    assert billing.receive(envelope, handler=name).outcomes == {name: Outcome.PARKED}
    assert billing.effects == ["gave up: no"]


def test_the_hook_is_told_in_the_transaction_that_quarantines_what_cannot_be_read(
    billing: Subscriber,
) -> None:
    def exhausted(delivery: Delivery, session: Session, error: BaseException) -> None:
        assert delivery.event is None
        billing.effect(session, f"{delivery.envelope.type}: {type(error).__name__}")

    billing.service.on(Placed, exhausted=exhausted)(_raise)

    billing.receive(_changed(billing.placed().body, data={}))

    assert billing.effects == ["order.placed: MalformedMessage"]
    assert len(billing.quarantined) == 1


def test_what_cannot_be_read_comes_back_when_its_hook_fails_or_finds_it_busy(
    billing: Subscriber,
) -> None:
    errors: list[Exception] = [Busy("someone holds the row"), RuntimeError("hook")]

    def exhausted(delivery: Delivery, session: Session, error: BaseException) -> None:
        billing.effect(session, "told")
        if errors:
            raise errors.pop(0)

    name = "billing._raise"
    retry = RetryPolicy(attempts=1, first=timedelta(0), cap=timedelta(0))
    billing.service.on(Placed, retry=retry, exhausted=exhausted)(_raise)
    envelope = _changed(billing.placed().body, data={})

    assert billing.receive(envelope).outcomes == {name: Outcome.BUSY}
    assert billing.receive(envelope, handler=name).outcomes == {name: Outcome.RETRY}
    assert (billing.effects, billing.quarantined, len(billing.owed)) == ([], [], 1)

    assert billing.receive(envelope, handler=name).outcomes == {name: Outcome.PARKED}
    assert (billing.effects, billing.owed) == (["told"], [])


def test_a_handler_of_another_deployment_is_waited_for_and_then_parked(
    billing: Subscriber,
) -> None:
    envelope = billing.placed()
    with billing.session() as session, session.begin():
        pending.schedule(session, "billing", "billing.renamed", envelope)

    outcomes = [
        billing.receive(envelope, handler="billing.renamed").outcomes["billing.renamed"]
        for _ in range(AT_ONCE.attempts)
    ]

    assert outcomes == [Outcome.RETRY, Outcome.RETRY, Outcome.PARKED]
    assert "no handler is named billing.renamed" in billing.dead[0].error


# ---- what may have killed a worker ----


def test_a_redelivered_message_is_counted_before_its_handler_runs(billing: Subscriber) -> None:
    seen: list[int] = []

    @billing.service.on(Placed)
    def bill(event: Placed, session: Session) -> None:
        seen.append(billing.owed[0].attempts)

    receipt = billing.receive(billing.placed(), redelivered=True)

    assert receipt.outcomes == {BILL: Outcome.HANDLED}
    assert seen == [1]
    assert billing.owed == []


def test_one_that_kills_its_worker_each_time_is_parked(billing: Subscriber) -> None:
    """SystemExit stands for the kill: nothing after it runs, and the broker has it back."""
    hooked: list[str] = []
    billing.service.on(
        Placed, exhausted=lambda delivery, session, error: hooked.append(delivery.event.order)
    )(_exit)
    envelope = billing.placed("o9")
    name = "billing._exit"

    with pytest.raises(SystemExit):
        billing.receive(envelope)
    for number in range(1, AT_ONCE.attempts + 1):
        with pytest.raises(SystemExit):
            billing.receive(envelope, redelivered=number == 1, handler=_again(number, name))
        assert billing.owed[0].attempts == number
    receipt = billing.receive(envelope, handler=name)

    assert receipt.outcomes == {name: Outcome.PARKED}
    assert "none finished" in billing.dead[0].error
    assert hooked == ["o9"]
    assert billing.effects == []


def test_a_redelivered_message_that_was_handled_is_acked_at_once(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    envelope = billing.placed()
    billing.receive(envelope)

    receipt = billing.receive(envelope, redelivered=True)

    assert receipt.outcomes == {BILL: Outcome.DUPLICATE}
    assert (billing.effects, billing.owed) == (["billed"], [])


# ---- what cannot be given to a handler ----


def test_the_same_id_with_another_content_is_quarantined(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    envelope = billing.placed()
    billing.receive(envelope)
    forged = envelope.body.replace(b'"total":1', b'"total":9')
    assert forged != envelope.body

    receipt = billing.receive(forged)

    assert receipt.outcomes == {BILL: Outcome.QUARANTINED}
    assert billing.effects == ["billed"]
    assert "other content" in billing.quarantined[0].reason
    assert bytes(billing.quarantined[0].body) == forged


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no JSON"),
        (b"\x00\x01\xff", "NUL"),
        (b"[1, 2]", "not a CloudEvents object"),
        (b'{"specversion": "1.0"}', "no data"),
        (b'{"specversion": "0.3", "data": {}}', "specversion"),
        (b"[" * 5_000, "nests"),
        (b'{"specversion":"1.0","data":1e99999}', "exponent"),
        (b"\x80\x04\x95cposix\nsystem\n.", "no JSON"),
    ],
)
def test_what_is_no_envelope_is_quarantined(billing: Subscriber, body: bytes, reason: str) -> None:
    receipt = billing.receive(body, headers={"task": "x\x00y", "raw": b"\xff"})

    assert receipt.refused is not None
    assert reason in receipt.refused
    assert bytes(billing.quarantined[0].body) == body
    assert reason in billing.quarantined[0].reason


def _changed(envelope_body: bytes, **attributes: Any) -> bytes:
    return json.dumps({**json.loads(envelope_body), **attributes}).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": "order.lost"}, "no handler of service billing takes 'order.lost'"),
        ({"eventversion": 7}, "arrived in version 7"),
        ({"data": {"order": 5}}, "order: Input should be a valid string"),
        ({"id": "01234567-89ab-7cde-8f01-23456789abcd"}, "beyond the dedupe window"),
        ({"id": "no-uuid"}, "not valid"),
    ],
)
def test_an_event_that_no_handler_can_take_is_quarantined_with_the_reason(
    billing: Subscriber, change: dict[str, Any], reason: str
) -> None:
    billing.service.on(Placed)(billing.write("billed"))

    billing.receive(_changed(billing.placed().body, **change))

    assert billing.effects == []
    assert reason in billing.quarantined[0].reason
    assert billing.owed == []


def test_copies_of_one_bad_message_share_a_row(billing: Subscriber) -> None:
    for _ in range(3):
        billing.receive(b"garbage")

    (row,) = billing.quarantined
    assert row.times_seen == 3


def test_a_redelivered_message_that_cannot_be_read_leaves_no_note(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))

    billing.receive(_changed(billing.placed().body, data={}), redelivered=True)

    assert (len(billing.quarantined), billing.owed) == (1, [])


def test_a_handler_is_not_given_a_version_it_did_not_subscribe_to(billing: Subscriber) -> None:
    @billing.registry.event("order.placed", version=2)
    class PlacedV2(BaseModel):
        order: str
        total: int

    billing.service.on(PlacedV2)(billing.write("second"))
    billing.service.on(Placed, name="billing.old")(billing.write("first"))

    receipt = billing.receive(billing.placed())

    assert receipt.outcomes == {BILL: Outcome.QUARANTINED, "billing.old": Outcome.HANDLED}
    assert "not in 1" in billing.quarantined[0].reason


def test_a_quarantined_event_is_handled_when_fed_through_after_a_deploy(
    billing: Subscriber,
) -> None:
    envelope = billing.placed()
    billing.receive(envelope)  # nobody subscribes yet
    billing.service.on(Placed)(billing.write("billed"))
    with billing.session() as session, session.begin():
        assert quarantine.redrive(session, billing.quarantined[0].id)
    assert billing.quarantined == []

    receipt = billing.receive(envelope, handler=pending.EVERY_HANDLER)

    assert receipt.outcomes == {BILL: Outcome.HANDLED}
    assert (billing.effects, billing.owed) == (["billed"], [])


def test_a_message_that_still_cannot_be_read_comes_back_to_quarantine(
    billing: Subscriber,
) -> None:
    billing.receive(b"garbage")
    with billing.session() as session, session.begin():
        quarantine.redrive(session, billing.quarantined[0].id)

    billing.receive(b"garbage", handler=pending.EVERY_HANDLER)

    assert (len(billing.quarantined), billing.owed) == (1, [])


def test_feeding_through_an_old_event_runs_it(billing: Subscriber) -> None:
    billing.service.on(Placed)(billing.write("billed"))
    body = _changed(billing.placed().body, id="01234567-89ab-7cde-8f01-23456789abcd")
    billing.receive(body)
    with billing.session() as session, session.begin():
        quarantine.redrive(session, billing.quarantined[0].id)

    billing.receive(body, handler=pending.EVERY_HANDLER)

    assert billing.effects == ["billed"]


def test_the_quarantine_is_bounded(billing: Subscriber) -> None:
    with billing.session() as session, session.begin():
        for number in range(5):
            quarantine.put(session, "billing", b"%d" % number, "bad", max_rows=3)

    assert [bytes(row.body) for row in billing.quarantined] == [b"2", b"3", b"4"]


# ---- timers ----


def test_a_timer_runs_a_handler_that_does_not_subscribe(billing: Subscriber) -> None:
    billing.service.add(
        Handler(
            "billing.remind",
            frozenset({"order.placed"}),
            run=lambda delivery, session: billing.effect(session, delivery.event.order),
            subscribes=False,
        )
    )
    envelope = billing.placed("o5")
    with billing.session() as session, session.begin():
        due = now() - timedelta(seconds=1)
        assert pending.schedule(session, "billing", "billing.remind", envelope, due)
        assert not pending.schedule(session, "billing", "billing.remind", envelope, due)

    assert billing.receive(envelope).refused is not None
    receipt = billing.receive(envelope, handler="billing.remind")

    assert receipt.outcomes == {"billing.remind": Outcome.HANDLED}
    assert (billing.effects, billing.owed) == (["o5"], [])


def test_a_timer_outlives_the_dedupe_window(billing: Subscriber) -> None:
    billing.settings = ReceiveSettings(dedupe_window=timedelta(microseconds=1))
    billing.service.on(Placed)(billing.write("billed"))
    envelope = billing.placed()
    with billing.session() as session, session.begin():
        pending.schedule(session, "billing", BILL, envelope)

    assert billing.receive(envelope, handler=BILL).outcomes == {BILL: Outcome.HANDLED}


def test_a_naive_due_time_is_refused(billing: Subscriber) -> None:
    with billing.session() as session, pytest.raises(ValueError, match="no zone"):
        pending.schedule(session, "billing", BILL, billing.placed(), now().replace(tzinfo=None))


def _raise(event: Placed, session: Session) -> None:
    raise ValueError("no")


def _exit(event: Placed, session: Session) -> None:
    raise SystemExit


def _again(number: int, name: str) -> str | None:
    """The broker redelivers the first; from then on the note is what it is sent again from."""
    return None if number == 1 else name
