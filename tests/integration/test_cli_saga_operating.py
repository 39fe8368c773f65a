"""`saga resume`, `saga abort` and `saga skip-compensation`, also while a worker is at the same saga."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import dead_letters
from outbox.dead_letters import Matching
from outbox.events import Registry
from saga import case
from saga.cli import main
from saga.control import SagaCompleted
from tests.overlapping import StoppingJournal, StoppingParticipant, overlap
from tests.sagas import Shop, check_whole


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@pytest.fixture
def shop(engine: Engine) -> Shop:
    shop = Shop(engine, StoppingParticipant, unwind="eager")
    shop.run("DELETE FROM outbox.dead_letter")
    shop.run("DELETE FROM outbox.pending_delivery")
    return shop


def run(shop: Shop, *arguments: object) -> Result:
    url = shop.engine.url.render_as_string(hide_password=False)
    environment = {"OUTBOX_DATABASE_URL": url}
    return CliRunner(env=environment).invoke(main, [str(one) for one in arguments])


def document(result: Result) -> Any:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return json.loads(result.stdout)


def stuck_in_a_step(shop: Shop) -> UUID:
    shop.failures["inventory.do"] = 2
    saga_id = shop.start()
    shop.play.settle()
    assert shop.states(saga_id)["inventory"] == "running stuck"
    return saga_id


def owing_its_compensation(shop: Shop) -> UUID:
    """Aborted by shipping, with inventory's compensation owed and not tried yet."""
    saga_id = shop.start("shipping")
    for branch in ("inventory", "users", "shipping"):
        shop.deliver("order.created", branch)
    shop.deliver("saga.aborted", "inventory")
    assert shop.steps(saga_id)["inventory.act"] == "compensating"
    return saga_id


def stuck_in_a_compensation(shop: Shop) -> UUID:
    shop.failures["inventory.undo"] = 2
    saga_id = owing_its_compensation(shop)
    shop.play.settle()
    assert shop.states(saga_id)["inventory"] == "compensating stuck"
    return saga_id


def compensation_of_inventory(shop: Shop) -> Any:
    waiting = shop.play.collect()
    return next(one for one in waiting if one.handler == "inventory.act.compensation")


def interventions(shop: Shop, saga_id: UUID) -> list[Any]:
    return shop.rows(
        "SELECT * FROM outbox.saga_intervention WHERE saga_id = :id ORDER BY id", id=saga_id
    )


# ---- resume ----


def test_resume_gives_back_what_is_stuck_and_a_redrive_after_it_finds_nothing(shop: Shop) -> None:
    saga_id = stuck_in_a_step(shop)
    (told,) = document(run(shop, "resume", saga_id, "--json"))["resumed"]
    assert (told["participant"], told["step"]) == ("inventory", "act")
    assert told["by"].startswith("dead letter ")
    with Session(shop.engine) as session, session.begin():
        assert dead_letters.redrive(session, Matching()) == 0
    (again,) = document(run(shop, "resume", saga_id, "--json"))["resumed"]
    assert again["by"] == "under way already"
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"


def test_resume_gives_back_a_compensation(shop: Shop) -> None:
    saga_id = stuck_in_a_compensation(shop)
    assert run(shop, "resume", saga_id, "--by", "ana", "--reason", "mended").exit_code == 0
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"
    (done,) = interventions(shop, saga_id)
    assert (done.verb, done.operator, done.reason, done.step) == ("resume", "ana", "mended", "act")


@pytest.mark.parametrize("stuck", [stuck_in_a_step, stuck_in_a_compensation])
def test_resume_owes_from_the_journal_what_somebody_discarded(
    shop: Shop, stuck: Callable[[Shop], UUID]
) -> None:
    saga_id = stuck(shop)
    with Session(shop.engine) as session, session.begin():
        assert dead_letters.discard(session, Matching(), "by mistake") == 1
    (told,) = document(run(shop, "resume", saga_id, "--json"))["resumed"]
    assert told["by"] == "the journal"
    shop.play.settle()
    check_whole(shop, saga_id)


def test_resume_gives_back_a_join(shop: Shop) -> None:
    shop.failures["order.confirm"] = 2
    saga_id = shop.start()
    shop.play.settle()
    assert run(shop, "resume", saga_id).exit_code == 0
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"


def test_resume_feeds_a_quarantined_trigger_through_again(shop: Shop) -> None:
    saga_id = shop.start()
    trigger = shop.message("order.created", "inventory")
    readable = shop.inventory.registry
    shop.inventory.registry = Registry()  # as in a deployment that cannot read it
    shop.play.deliver(trigger)
    shop.inventory.registry = readable
    assert shop.states(saga_id)["inventory"] == "running stuck"
    (told,) = document(run(shop, "resume", saga_id, "--json"))["resumed"]
    assert told["by"].startswith("quarantined message ")
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"


def test_resume_of_a_saga_that_is_not_stuck_does_nothing(shop: Shop) -> None:
    saga_id = shop.start()
    result = run(shop, "resume", saga_id)
    assert (result.exit_code, "nothing of saga" in result.stdout) == (0, True)


def test_resume_says_that_two_decisions_are_no_matter_of_trying_again(shop: Shop) -> None:
    saga_id = shop.start()
    assert run(shop, "abort", saga_id, "--reason", "gone").exit_code == 0
    with Session(shop.engine) as session, session.begin():
        journal = shop.order.journal(session)
        completed = SagaCompleted(saga_id, "order", "confirm")
        shop.order._runtime.publish(journal, completed, saga_id, None)
    shop.play.settle()
    result = run(shop, "resume", saga_id, "--json")
    assert result.exit_code == 1
    assert all(one["by"].startswith("no: ") for one in document(result)["resumed"])


# ---- abort ----


def test_abort_where_the_saga_is_decided_undoes_it_everywhere(shop: Shop) -> None:
    saga_id = stuck_in_a_step(shop)
    told = document(run(shop, "abort", saga_id, "--reason", "gone", "--by", "ana", "--json"))
    assert (told["aborted_by"], told["operator"]) == ("order", "ana")
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"
    (row,) = shop.rows(
        "SELECT reason FROM outbox.saga WHERE saga_id = :id AND participant = 'inventory'",
        id=saga_id,
    )
    assert row.reason == "order.abort: gone (ana)"
    with Session(shop.engine) as session, session.begin():
        assert dead_letters.redrive(session, Matching()) == 1
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"


def test_abort_elsewhere_is_refused_unless_it_is_forced(shop: Shop) -> None:
    saga_id = stuck_in_a_step(shop)
    arguments = ("abort", saga_id, "--participant", "users", "--reason", "gone")
    refused = run(shop, *arguments)
    assert refused.exit_code == 1
    assert "users does not decide saga" in refused.stderr
    assert "--force" in refused.stderr
    assert interventions(shop, saga_id) == []
    forced = run(shop, *arguments, "--force")
    assert (forced.exit_code, "warning: forced" in forced.stderr) == (0, True)
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"


@pytest.mark.parametrize("force", [False, True])
def test_abort_of_a_decided_saga_is_refused_even_by_force(shop: Shop, force: bool) -> None:
    saga_id = shop.start()
    shop.play.settle()
    options = ["--force"] if force else []
    refused = run(shop, "abort", saga_id, "--reason", "too late", *options)
    assert refused.exit_code == 1
    assert "a decision is not taken back" in refused.stderr
    assert check_whole(shop, saga_id) == "completed"


def test_a_second_abort_is_refused(shop: Shop) -> None:
    saga_id = shop.start()
    assert run(shop, "abort", saga_id, "--reason", "gone").exit_code == 0
    assert "aborted before" in run(shop, "abort", saga_id, "--reason", "gone").stderr


def test_an_abort_needs_a_reason_and_a_saga_that_is_known(shop: Shop) -> None:
    assert run(shop, "abort", uuid4()).exit_code == 2
    unknown = run(shop, "abort", uuid4(), "--reason", "gone", "--json")
    assert unknown.exit_code == 1
    assert "has never heard of saga" in json.loads(unknown.stdout)["error"]


def test_an_abort_during_the_deciding_join_waits_and_is_refused(shop: Shop) -> None:
    saga_id = shop.start()
    for branch in ("inventory", "users", "shipping"):
        shop.deliver("order.created", branch)
    shop.deliver("stock.reserved", "order")
    shop.deliver("points.added", "order")
    last = shop.message("shipment.created", "order")
    results: list[Result] = []
    assert overlap(
        shop.engine,
        lambda: shop.play.deliver(last),
        lambda: results.append(run(shop, "abort", saga_id, "--reason", "late")),
        after="move",
    )
    assert "a decision is not taken back" in results[0].stderr
    shop.play.settle()
    assert check_whole(shop, saga_id) == "completed"


def test_the_deciding_join_waits_for_an_abort_and_does_not_fire(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case, "SqlJournal", StoppingJournal)
    saga_id = shop.start()
    for branch in ("inventory", "users", "shipping"):
        shop.deliver("order.created", branch)
    shop.deliver("stock.reserved", "order")
    shop.deliver("points.added", "order")
    last = shop.message("shipment.created", "order")
    assert overlap(
        shop.engine,
        lambda: run(shop, "abort", saga_id, "--reason", "gone"),
        lambda: shop.play.deliver(last),
        after="move",
    )
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"


# ---- skip-compensation ----


def test_a_skipped_compensation_counts_as_done_with_who_and_why_and_leaves_no_dead_letter(
    shop: Shop,
) -> None:
    saga_id = stuck_in_a_compensation(shop)
    skipped = run(shop, "skip-compensation", saga_id, "act", "--reason", "refunded by hand")
    assert skipped.exit_code == 0, skipped.output
    assert shop.rows("SELECT * FROM outbox.dead_letter") == []
    shop.play.settle()
    assert set(shop.states(saga_id).values()) == {"compensated"}
    assert "inventory.undo" not in shop.effects(saga_id)
    told = document(run(shop, "show", saga_id, "--json"))
    (step,) = [one for one in told["steps"] if one["participant"] == "inventory"]
    user = getpass.getuser()
    assert step["reason"] == f"skipped by {user}: refunded by hand"
    (done,) = told["interventions"]
    assert (done["verb"], done["operator"]) == ("skip-compensation", user)
    assert "refunded by hand" in run(shop, "show", saga_id).stdout


def test_what_owes_no_compensation_cannot_be_skipped_and_the_refusal_says_what_there_is(
    shop: Shop,
) -> None:
    saga_id = stuck_in_a_step(shop)
    refused = run(shop, "skip-compensation", saga_id, "inventory.act", "--reason", "x")
    assert (refused.exit_code, "inventory.act is stuck" in refused.stderr) == (1, True)
    unknown = run(shop, "skip-compensation", saga_id, "acct", "--reason", "x")
    assert "its runs here: " in unknown.stderr


def test_one_of_several_runs_is_named_by_its_participant_or_trigger(shop: Shop) -> None:
    shop.failures.update({"inventory.undo": 2, "users.undo": 2})
    saga_id = owing_its_compensation(shop)
    shop.play.settle()
    refused = run(shop, "skip-compensation", saga_id, "act", "--reason", "x")
    assert "each of 2 runs of act owes a compensation" in refused.stderr
    done = run(shop, "skip-compensation", saga_id, "users.act", "--reason", "x", "--json")
    assert document(done)["step"] == "act"
    assert shop.steps(saga_id)["users.act"] == "compensated"
    assert shop.states(saga_id)["inventory"] == "compensating stuck"


def test_a_skip_during_the_compensation_waits_for_it_and_is_refused(shop: Shop) -> None:
    saga_id = owing_its_compensation(shop)
    due = compensation_of_inventory(shop)
    results: list[Result] = []
    assert overlap(
        shop.engine,
        lambda: shop.play.deliver(due),
        lambda: results.append(run(shop, "skip-compensation", saga_id, "act", "--reason", "x")),
        after="claim",
    )
    assert "was compensated meanwhile" in results[0].stderr
    assert interventions(shop, saga_id) == []
    shop.play.settle()
    assert check_whole(shop, saga_id) == "compensated"


@pytest.mark.parametrize("after", ["claim", "lock", "move"])
def test_a_compensation_during_its_skip_waits_and_calls_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    monkeypatch.setattr(case, "SqlJournal", StoppingJournal)
    saga_id = owing_its_compensation(shop)
    due = compensation_of_inventory(shop)
    overlap(
        shop.engine,
        lambda: run(shop, "skip-compensation", saga_id, "act", "--reason", "x"),
        lambda: shop.play.deliver(due),
        after=after,
    )
    shop.play.settle()
    assert "inventory.undo" not in shop.effects(saga_id)
    assert set(shop.states(saga_id).values()) == {"compensated"}
    assert shop.rows("SELECT * FROM outbox.pending_delivery") == []


def test_a_compensation_that_is_parked_during_its_skip_is_not_left_stuck(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case, "SqlJournal", StoppingJournal)
    shop.failures["inventory.undo"] = 2
    saga_id = owing_its_compensation(shop)
    shop.play.deliver(compensation_of_inventory(shop))
    due = compensation_of_inventory(shop)
    results: list[Result] = []
    overlap(
        shop.engine,
        lambda: results.append(run(shop, "skip-compensation", saga_id, "act", "--reason", "x")),
        lambda: shop.play.deliver(due),
        after="claim",
    )
    shop.play.settle()
    with Session(shop.engine) as session, session.begin():
        dead_letters.redrive(session, Matching())
    shop.play.settle()
    assert results[0].exit_code == 0, results[0].output
    assert set(shop.states(saga_id).values()) == {"compensated"}
    assert shop.effects(saga_id).count("inventory.undo") == 0
