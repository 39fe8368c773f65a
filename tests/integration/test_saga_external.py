"""External steps: a bank charges once per saga that completes, and keeps nothing of one that does not,
whatever dies and whoever aborts between the intent and the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from outbox.errors import ConfigurationError
from outbox.events import Registry
from saga import Participant
from saga.cli import main
from saga.testing.choreography import Message
from tests.databases import Databases
from tests.overlapping import StoppingParticipant, overlap
from tests.payments import Bank, Killed, Ordered, Paid, Payments, unknown

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engines(databases: Databases) -> Iterator[tuple[Engine, Engine]]:
    """The participants' database and the bank's own; each test looks at its own saga only."""
    urls = [databases.create_migrated(), databases.create_migrated()]
    engines = [create_engine(url) for url in urls]
    yield engines[0], engines[1]
    for engine, url in zip(engines, urls, strict=True):
        engine.dispose()
        databases.drop(url)


@pytest.fixture
def shop(engines: tuple[Engine, Engine]) -> Payments:
    shop = Payments(engines[0], Bank(engines[1]))
    shop.run("DELETE FROM outbox.dead_letter")
    shop.run("DELETE FROM outbox.pending_delivery")
    return shop


class Once:
    """Does something the first time that a place is passed."""

    def __init__(self, where: str, what: Callable[[], object]) -> None:
        self.where, self.what, self.is_over = where, what, False

    def __call__(self, where: str) -> None:
        if where == self.where and not self.is_over:
            self.is_over = True
            self.what()


def die() -> None:
    raise Killed


def fail() -> None:
    raise ConnectionError("the bank does not answer")


def command(shop: Payments, *arguments: object) -> Result:
    url = shop.engine.url.render_as_string(hide_password=False)
    runner = CliRunner(env={"OUTBOX_DATABASE_URL": url})
    return runner.invoke(main, [str(one) for one in arguments])


def charged_by_a_worker_that_dies(shop: Payments, where: str) -> None:
    shop.bank.at = Once(where, die)
    with pytest.raises(Killed):
        shop.deliver("order.ordered", "payments")


# ---- the ordinary course ----


def test_an_external_step_is_called_once_outside_of_any_transaction(shop: Payments) -> None:
    saga_id = shop.start()

    seen: list[object] = []

    def look() -> None:
        open_ones = shop.rows(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND state = 'idle in transaction'"
        )
        seen.append((shop.step(saga_id), len(open_ones)))

    shop.bank.at = Once("before charge", look)
    shop.play.settle()
    assert seen == [("calling", 0)]
    assert shop.check_whole(saga_id) == "completed"
    assert shop.bank.charges(saga_id) == [(1, 0)]


def test_a_rejection_from_outside_aborts_the_saga(shop: Payments) -> None:
    shop.bank.declines = True
    saga_id = shop.start()
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert (shop.step(saga_id), shop.bank.charges(saga_id)) == ("rejected", [])


def test_an_abort_after_the_charge_refunds_it(shop: Payments) -> None:
    saga_id = shop.start(is_out_of_stock=True)
    shop.deliver("order.ordered", "payments")
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert shop.bank.charges(saga_id) == [(1, 1)]


def test_an_abort_before_the_trigger_charges_nothing(shop: Payments) -> None:
    saga_id = shop.start(is_out_of_stock=True)
    trigger = shop.message("order.ordered", "payments")
    shop.play.waiting.remove(trigger)
    shop.play.settle()
    shop.play.deliver(trigger)
    assert (shop.step(saga_id), shop.bank.charges(saga_id)) == ("skipped", [])
    assert shop.check_whole(saga_id) == "compensated"


# ---- an abort between intent and result ----


@pytest.mark.parametrize("where", ["before charge", "after charge"])
def test_an_abort_during_the_call_finds_it_uncertain_and_has_it_refunded(
    shop: Payments, where: str
) -> None:
    saga_id = shop.start(is_out_of_stock=True)
    shop.deliver("order.ordered", "stock")
    during: list[tuple[str | None, str]] = []

    def abort() -> None:
        shop.deliver("saga.aborted", "payments")
        during.append((shop.step(saga_id), shop.states(saga_id)["payments"]))

    shop.bank.at = Once(where, abort)
    shop.deliver("order.ordered", "payments")
    assert during == [("calling", "compensating")]
    assert shop.step(saga_id) == "compensating"
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert shop.bank.charges(saga_id) == [(1, 1)]


def test_an_abort_during_a_call_that_is_declined_leaves_nothing_to_undo(shop: Payments) -> None:
    saga_id = shop.start(is_out_of_stock=True)
    shop.deliver("order.ordered", "stock")
    shop.bank.declines = True
    shop.bank.at = Once("before charge", lambda: shop.deliver("saga.aborted", "payments"))
    shop.deliver("order.ordered", "payments")
    assert shop.step(saga_id) == "rejected"
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"


@pytest.mark.parametrize(
    ("where", "end", "charges"),
    [("before charge", "not_happened", []), ("after charge", "compensated", [(1, 1)])],
)
def test_an_abort_after_the_worker_died_in_the_call_waits_until_it_is_resolved(
    shop: Payments, where: str, end: str, charges: list[tuple[int, int]]
) -> None:
    saga_id = shop.start(is_out_of_stock=True)
    charged_by_a_worker_that_dies(shop, where)
    shop.deliver("order.ordered", "stock")
    shop.deliver("saga.aborted", "payments")
    assert shop.states(saga_id)["payments"] == "compensating"
    shop.play.settle()
    assert (shop.step(saga_id), shop.bank.charges(saga_id)) == (end, charges)
    assert shop.check_whole(saga_id) == "compensated"


# ---- redelivery ----


@pytest.mark.parametrize(
    ("where", "calls"), [("before charge", 1), ("after charge", 1)], ids=["uncharged", "charged"]
)
def test_a_redelivery_asks_before_it_calls_again(shop: Payments, where: str, calls: int) -> None:
    saga_id = shop.start()
    charged_by_a_worker_that_dies(shop, where)
    shop.play.settle()
    assert shop.check_whole(saga_id) == "completed"
    assert shop.bank.charges(saga_id) == [(calls, 0)]


@pytest.mark.parametrize("where", ["before charge", "after charge"])
def test_a_call_that_fails_is_resolved_in_the_next_attempt(shop: Payments, where: str) -> None:
    saga_id = shop.start()
    shop.bank.at = Once(where, fail)
    shop.play.settle()
    assert shop.check_whole(saga_id) == "completed"
    assert shop.bank.charges(saga_id) == [(1, 0)]


def test_a_copy_does_not_call_while_the_first_one_is_calling(shop: Payments) -> None:
    saga_id = shop.start()
    trigger = shop.message("order.ordered", "payments")
    outcomes: list[str] = []
    shop.bank.at = Once("before charge", lambda: outcomes.append(str(shop.play.deliver(trigger))))
    shop.play.deliver(trigger)
    assert outcomes == ["payments.charge owed"]
    shop.play.settle()
    assert shop.check_whole(saga_id) == "completed"


def test_a_late_result_of_a_paused_worker_is_undone_after_all(shop: Payments) -> None:
    saga_id = shop.start(is_out_of_stock=True)
    trigger = shop.message("order.ordered", "payments")

    seen: list[object] = []

    def everyone_else_goes_on() -> None:
        shop.deliver("order.ordered", "stock")
        shop.deliver("saga.aborted", "payments")
        shop.play.settle()
        seen.append((shop.step(saga_id), *set(shop.states(saga_id).values())))

    shop.bank.at = Once("before charge", everyone_else_goes_on)
    shop.play.deliver(trigger)
    assert seen == [("not_happened", "compensated")]
    assert shop.step(saga_id) == "compensating"
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert shop.bank.charges(saga_id) == [(1, 1)]


def test_two_late_results_of_one_saga_are_both_undone(shop: Payments) -> None:
    tips: list[str] = []

    @shop.payments.step(on=Ordered, external=True)
    def tip(ordered: Ordered) -> None:
        shop.bank.at("before tip")
        tips.append("do")

    @tip.resolve
    def look_up(ordered: Ordered) -> bool:
        return False

    @tip.compensation
    def take_back(ordered: Ordered, session: Session) -> None:
        tips.append("undo")

    saga_id = shop.start(is_out_of_stock=True)
    trigger = shop.message("order.ordered", "payments")

    def everyone_else_goes_on() -> None:
        shop.deliver("order.ordered", "stock")
        shop.deliver("saga.aborted", "payments")
        shop.play.settle()

    paused = (
        Once("before charge", lambda: shop.play.deliver(trigger)),
        Once("before tip", everyone_else_goes_on),
    )
    shop.bank.at = lambda where: [one(where) for one in paused]
    shop.play.deliver(trigger)
    assert all(one.is_over for one in paused)
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert shop.bank.charges(saga_id) == [(1, 1)]
    assert tips == ["do", "undo"]


def test_two_workers_that_call_at_once_charge_one_key_and_finish_once(shop: Payments) -> None:
    saga_id = shop.start()
    trigger = shop.message("order.ordered", "payments")

    def the_lease_runs_out() -> None:
        owed = next(one for one in shop.play.collect() if one.handler == "payments.charge")
        shop.play.deliver(owed)

    shop.bank.at = Once("before charge", the_lease_runs_out)
    shop.play.deliver(trigger)
    shop.play.settle()
    assert shop.check_whole(saga_id) == "completed"
    assert shop.bank.charges(saga_id) == [(2, 0)]


@pytest.mark.parametrize(
    ("after", "time"),
    [("lock", 1), ("record", 1), ("lock", 2), ("record", 2)],
    ids=["before the intent", "intent", "before the result", "result"],
)
def test_an_abort_at_the_same_moment_waits_for_the_intent_or_the_result(
    engines: tuple[Engine, Engine], after: str, time: int
) -> None:
    shop = Payments(engines[0], Bank(engines[1]), kind=StoppingParticipant)
    saga_id = shop.start(is_out_of_stock=True)
    shop.deliver("order.ordered", "stock")
    trigger = shop.message("order.ordered", "payments")
    abort = shop.message("saga.aborted", "payments")
    assert overlap(
        shop.engine,
        lambda: shop.play.deliver(trigger),
        lambda: shop.play.deliver(abort),
        after=after,
        time=time,
    )
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert shop.bank.charges(saga_id) == [(1, 1)]


@pytest.mark.parametrize("after", ["lock", "move"])
def test_an_intent_at_the_moment_of_the_abort_waits_for_it_and_calls_nothing(
    engines: tuple[Engine, Engine], after: str
) -> None:
    shop = Payments(engines[0], Bank(engines[1]), kind=StoppingParticipant)
    saga_id = shop.start(is_out_of_stock=True)
    shop.deliver("order.ordered", "stock")
    trigger = shop.message("order.ordered", "payments")
    abort = shop.message("saga.aborted", "payments")
    assert overlap(
        shop.engine,
        lambda: shop.play.deliver(abort),
        lambda: shop.play.deliver(trigger),
        after=after,
    )
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert (shop.step(saga_id), shop.bank.charges(saga_id)) == ("skipped", [])


@pytest.mark.parametrize("seed", range(25))
def test_whatever_dies_fails_or_aborts_at_the_bank_every_saga_ends_whole(
    shop: Payments, seed: int
) -> None:
    random = Random(seed)
    trouble = 6

    def at(where: str) -> None:
        nonlocal trouble
        if trouble and random.random() < 0.6:
            trouble -= 1
            what = random.choice(["die", "fail", "deliver", "unknown"])
            if what == "die":
                raise Killed
            if what == "fail":
                raise ConnectionError("the bank does not answer")
            if what == "unknown":
                unknown(where)
            others = [one for one in shop.play.collect() if one.handler != "payments.charge"]
            if others:
                deliver(random.choice(others))

    def deliver(message: Message) -> None:
        try:
            shop.play.deliver(message)
        except Killed:
            shop.play.waiting.append(message)

    saga_id = shop.start(is_out_of_stock=random.random() < 0.6)
    shop.bank.at = at
    for _ in range(6):
        while shop.play.collect():
            deliver(random.choice(shop.play.waiting))
        if command(shop, "resume", saga_id).stdout.startswith("nothing"):
            break
    shop.check_whole(saga_id)
    assert not any("stuck" in state for state in shop.states(saga_id).values())


# ---- real deaths ----


PROCESS = """
import sys
sys.path.insert(0, {root!r})
from sqlalchemy import create_engine
from tests.payments import Bank, Payments
shop = Payments(create_engine({url!r}), Bank(create_engine({bank!r})))
shop.play.receivers["payments"].receive({body!r})
"""


@pytest.mark.parametrize("abort", ["never", "after the death"])
@pytest.mark.parametrize(
    "point",
    ["receive.prepared", "receive.called", "receive.begun", "receive.handled", "receive.committed"],
)
def test_a_worker_killed_at_any_point_neither_charges_twice_nor_forgets_a_charge(
    shop: Payments, point: str, abort: str
) -> None:
    is_aborted = abort != "never"
    saga_id = shop.start(is_out_of_stock=is_aborted)
    trigger = shop.message("order.ordered", "payments")
    url, bank = (
        one.url.render_as_string(hide_password=False) for one in (shop.engine, shop.bank.engine)
    )
    code = PROCESS.format(root=str(ROOT), url=url, bank=bank, body=trigger.body)
    environment = {**os.environ, "OUTBOX_TEST": "1", "OUTBOX_CRASH_AT": f"{point}:1"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    if is_aborted:
        shop.deliver("order.ordered", "stock")
        shop.deliver("saga.aborted", "payments")
    shop.play.settle()
    assert shop.check_whole(saga_id) == ("compensated" if is_aborted else "completed")
    charges = shop.bank.charges(saga_id)
    if point == "receive.prepared" and is_aborted:
        assert charges == []
    else:
        assert charges == [(1, int(is_aborted))]


# ---- nobody knows ----


def unresolved(
    shop: Payments, *, is_out_of_stock: bool = False, where: str = "after charge"
) -> UUID:
    """A saga whose charge nobody can find out about, with payments' part stuck."""
    saga_id = shop.start(is_out_of_stock=is_out_of_stock)
    charged_by_a_worker_that_dies(shop, where)
    shop.bank.at = unknown
    shop.play.settle()
    shop.bank.at = lambda _: None
    assert shop.step(saga_id) == "unresolved"
    assert shop.states(saga_id)["payments"].endswith(" stuck")
    return saga_id


def resolve(shop: Payments, saga_id: UUID, *options: str) -> Result:
    return command(shop, "resolve", saga_id, "charge", "--reason", "asked", "--by", "ana", *options)


def test_what_nobody_can_find_out_is_stuck_and_resumed_once_the_bank_answers(
    shop: Payments,
) -> None:
    saga_id = unresolved(shop)
    stuck = json.loads(command(shop, "stuck", "--json").stdout)
    (step,) = next(one for one in stuck if one["saga_id"] == str(saga_id))["steps"]
    assert step["reason"] == "Unknown: the bank does not say"
    assert command(shop, "resume", saga_id).exit_code == 0
    shop.play.settle()
    assert shop.check_whole(saga_id) == "completed"
    assert shop.bank.charges(saga_id) == [(1, 0)]


def test_an_abort_leaves_what_nobody_knows_stuck_and_not_undone(shop: Payments) -> None:
    saga_id = unresolved(shop, is_out_of_stock=True)
    assert shop.states(saga_id)["payments"] == "compensating stuck"
    assert command(shop, "resume", saga_id).exit_code == 0
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert shop.bank.charges(saga_id) == [(1, 1)]


@pytest.mark.parametrize("is_out_of_stock", [False, True])
def test_a_person_says_that_it_happened_and_with_what(
    shop: Payments, is_out_of_stock: bool
) -> None:
    saga_id = unresolved(shop, is_out_of_stock=is_out_of_stock)
    (row,) = shop.bank._rows("SELECT key FROM charge WHERE key LIKE :id", id=f"{saga_id}/%")
    event = json.dumps({"order": "o1", "reference": f"ref {row.key}"})
    assert resolve(shop, saga_id, "--happened", "--event", event).exit_code == 0
    shop.bank.at = unknown
    shop.play.settle()
    assert shop.check_whole(saga_id) == ("compensated" if is_out_of_stock else "completed")
    shown = json.loads(command(shop, "show", saga_id, "--json").stdout)
    assert [one["verb"] for one in shown["interventions"]] == ["resolve"]


@pytest.mark.parametrize("is_out_of_stock", [False, True])
def test_a_person_says_that_it_did_not_happen(shop: Payments, is_out_of_stock: bool) -> None:
    saga_id = unresolved(shop, is_out_of_stock=is_out_of_stock, where="before charge")
    assert resolve(shop, saga_id, "--did-not-happen").exit_code == 0
    shop.bank.at = lambda where: unknown(where)
    shop.play.settle()
    assert shop.check_whole(saga_id) == ("compensated" if is_out_of_stock else "completed")
    assert shop.rows("SELECT * FROM outbox.dead_letter") == []


def test_happened_without_the_event_is_unresolved_again_and_says_what_to_give(
    shop: Payments,
) -> None:
    saga_id = unresolved(shop)
    assert resolve(shop, saga_id, "--happened").exit_code == 0
    shop.play.settle()
    assert shop.step(saga_id) == "unresolved"
    assert "saga resolve --happened --event" in command(shop, "show", saga_id).stdout


def test_what_is_not_unresolved_cannot_be_resolved_by_a_person(shop: Payments) -> None:
    saga_id = shop.start()
    charged_by_a_worker_that_dies(shop, "after charge")
    refused = resolve(shop, saga_id, "--did-not-happen")
    assert (refused.exit_code, "payments.charge is calling" in refused.stderr) == (1, True)
    assert resolve(shop, saga_id, "--happened", "--event", "{").exit_code == 1
    assert resolve(shop, saga_id).exit_code == 2
    assert resolve(shop, saga_id, "--did-not-happen", "--event", "{}").exit_code == 2


def test_a_person_who_knows_better_than_a_hook_that_is_being_asked_is_believed(
    shop: Payments,
) -> None:
    saga_id = unresolved(shop, is_out_of_stock=True)
    (row,) = shop.bank._rows("SELECT key FROM charge WHERE key LIKE :id", id=f"{saga_id}/%")
    event = json.dumps({"order": "o1", "reference": f"ref {row.key}"})
    command(shop, "resume", saga_id)
    find = shop.bank.find

    def finds_nothing(key: str) -> None:
        assert resolve(shop, saga_id, "--happened", "--event", event).exit_code == 0

    shop.bank.find = finds_nothing  # type: ignore[method-assign]
    due = next(one for one in shop.play.collect() if one.handler == "payments.charge")
    assert str(shop.play.deliver(due)) == "payments.charge busy"
    shop.bank.find = find  # type: ignore[method-assign]
    shop.play.settle()
    assert shop.check_whole(saga_id) == "compensated"
    assert shop.bank.charges(saga_id) == [(1, 1)]


def test_an_intent_is_not_taken_for_empty_when_its_step_is_no_longer_declared_external(
    shop: Payments,
) -> None:
    saga_id = shop.start()
    charged_by_a_worker_that_dies(shop, "after charge")
    newer = Payments(shop.engine, shop.bank, is_external=False)
    newer.play.settle()
    assert newer.step(saga_id) == "unresolved"
    assert newer.states(saga_id)["payments"].endswith(" stuck")
    told = command(shop, "show", saga_id).stdout
    assert "declare it so again" in told
    assert "saga resolve ID payments.charge" in told


def test_without_a_hook_an_uncertain_call_is_for_a_person(engines: tuple[Engine, Engine]) -> None:
    shop = Payments(engines[0], Bank(engines[1]), has_resolve=False)
    saga_id = shop.start()
    charged_by_a_worker_that_dies(shop, "after charge")
    shop.play.settle()
    assert shop.step(saga_id) == "unresolved"
    assert "no resolve hook" in command(shop, "show", saga_id).stdout


# ---- declaring ----


def declared(**options: Any) -> Any:
    registry = Registry()
    registry.event("order.ordered", key="order")(Ordered)
    registry.event("order.paid", key="order")(Paid)
    payments = Participant("payments", registry=registry)
    return payments.step(on=Ordered, emits=Paid, name="charge", **options)


def of_the_event(ordered: Ordered) -> Any: ...


def of_event_and_session(ordered: Ordered, session: Session) -> Any: ...


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: declared(external=True)(of_event_and_session), "must take (order_ordered)"),
        (lambda: declared(external=True, exhausted="abort")(of_the_event), "uncertain call"),
        (
            lambda: declared()(of_event_and_session).resolve(of_the_event),
            "only a step with external=True",
        ),
        (
            lambda: declared(external=True)(of_the_event).resolve(of_event_and_session),
            "must take (order_ordered)",
        ),
        (
            lambda: declared(external=True)(of_the_event).record(of_event_and_session),
            "must take (order_ordered, emitted, session)",
        ),
    ],
    ids=["a session", "exhausted", "a hook of another step", "a resolve", "a record"],
)
def test_a_wrongly_declared_external_step_is_refused_at_import(
    declare: Callable[[], object], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says.replace("(", r"\(").replace(")", r"\)")):
        declare()
