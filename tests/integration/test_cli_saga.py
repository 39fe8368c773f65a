"""`saga list`, `saga show` and `saga stuck` on one participant's database."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from saga.cli import main
from tests.sagas import Shop


@pytest.fixture
def shop(migrated_engine: Engine) -> Shop:
    return Shop(migrated_engine)


def run(shop: Shop, *arguments: str) -> Result:
    url = shop.engine.url.render_as_string(hide_password=False)
    return CliRunner(env={"OUTBOX_DATABASE_URL": url}).invoke(main, arguments)


def document(result: Result) -> Any:
    return json.loads(result.stdout)


def stuck_saga(shop: Shop) -> UUID:
    shop.failures["inventory.do"] = 2
    saga_id = shop.start()
    shop.play.settle()
    return saga_id


def test_list_shows_what_has_not_ended_and_all_of_it_when_asked(shop: Shop) -> None:
    ended = shop.start()
    shop.play.settle()
    going = shop.start()
    listed = document(run(shop, "list", "--json"))
    assert {(one["saga_id"], one["state"]) for one in listed} == {(str(going), "running")}
    everything = document(run(shop, "list", "--all", "--participant", "users", "--json"))
    assert [one["saga_id"] for one in everything] == [str(ended)]
    completed = document(run(shop, "list", "--state", "completed", "--limit", "2", "--json"))
    assert len(completed) == 2
    assert str(going) in run(shop, "list").stdout


def test_stuck_says_why_and_names_the_command_that_resumes_it(shop: Shop) -> None:
    saga_id = stuck_saga(shop)
    result = run(shop, "stuck", "--json")
    assert result.exit_code == 1
    (told,) = document(result)
    (step,) = told["steps"]
    assert told["saga_id"] == str(saga_id)
    assert (step["participant"], step["step"], step["state"]) == ("inventory", "act", "stuck")
    assert step["reason"] == "Broken: inventory.do is broken"
    saga, *arguments = step["resume_with"].split()
    assert saga == "saga"
    assert run(shop, *arguments).exit_code == 0
    shop.play.settle()
    assert shop.states(saga_id)["inventory"] == "completed"
    assert run(shop, "stuck").exit_code == 0


def test_stuck_names_the_compensation_that_keeps_failing(shop: Shop) -> None:
    shop.failures["inventory.undo"] = 2
    shop.start("shipping")
    shop.deliver("order.created", "inventory")
    shop.play.settle()
    text = run(shop, "stuck").stdout
    assert "inventory.undo is broken" in text
    assert "saga resume" in text


def test_show_tells_one_saga_with_steps_arrivals_and_events(shop: Shop) -> None:
    saga_id = stuck_saga(shop)
    told = document(run(shop, "show", str(saga_id), "--json"))
    assert {one["participant"] for one in told["participants"]} == set(shop.states(saga_id))
    states = {f"{one['participant']}.{one['step']}": one["state"] for one in told["steps"]}
    assert states == shop.steps(saga_id)
    assert {one["type"] for one in told["arrivals"]} == {"points.added", "shipment.created"}
    assert all(json.loads(one["trigger"])["sagaid"] == str(saga_id) for one in told["steps"])
    text = run(shop, "show", str(saga_id)).stdout
    assert "Once that is put right: saga resume" in text


def test_show_of_a_saga_nobody_has_heard_of_says_so(shop: Shop) -> None:
    result = run(shop, "show", str(uuid4()))
    assert result.exit_code == 1
    assert "there is no saga" in result.stderr


def test_an_id_that_is_none_is_a_wrong_call(shop: Shop) -> None:
    assert run(shop, "show", "17").exit_code == 2


def being_undone_without_shipping(shop: Shop) -> UUID:
    saga_id = shop.start("users")
    while here := [one for one in shop.play.collect() if one.service != "shipping"]:
        shop.play.deliver(here[0])
    return saga_id


def test_show_says_whom_the_unwinding_waits_for(shop: Shop) -> None:
    saga_id = being_undone_without_shipping(shop)
    shown = run(shop, "show", str(saga_id))
    assert "order.start:order.created is undone once shipping said so" in shown.stdout
    (wait,) = document(run(shop, "show", str(saga_id), "--json"))["waits"]
    assert (wait["step"], wait["waits_for"]) == ("start:order.created", ["shipping"])


def test_a_participant_that_is_gone_for_good_is_retired_and_holds_up_nothing(shop: Shop) -> None:
    saga_id = being_undone_without_shipping(shop)
    known = document(run(shop, "peers", "--json"))
    mutual = [(one["participant"], one["peer"], one["takes"]) for one in known]
    assert ("order", "shipping", ["order.created"]) in mutual
    assert document(run(shop, "retire", "shipping", "--json")) == {
        "inventory": 0, "order": 1, "users": 0,
    }  # fmt: skip
    while here := [one for one in shop.play.collect() if one.service != "shipping"]:
        shop.play.deliver(here[0])
    assert shop.states(saga_id)["order"] == "compensated"
    again = run(shop, "retire", "shipping")
    assert (again.exit_code, "there is no participant shipping" in again.stderr) == (1, True)
