"""`outbox dead` and `outbox quarantine`: what a person can do about what failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import dead_letters, pending, quarantine
from outbox.cli import main
from outbox.ids import new_id

Outbox = Callable[..., Result]


@pytest.fixture
def run_outbox(migrated_database_url: str) -> Outbox:
    def run(*arguments: str, answer: str | None = None) -> Result:
        environment = {"OUTBOX_DATABASE_URL": migrated_database_url, "OUTBOX_SCHEMA": None}
        return CliRunner(env=environment).invoke(main, arguments, input=answer)

    return run


@pytest.fixture
def park(migrated_engine: Engine) -> Callable[..., int]:
    """Parks a delivery and returns the dead letter's id."""

    def park(**changes: Any) -> int:
        values: dict[str, Any] = {
            "service": "billing", "handler": "billing.bill", "event_id": new_id(),
            "type": "order.placed", "body": b'{"id": "1", "data": {"total": 3}}', **changes,
        }  # fmt: skip
        error = values.pop("error", "CardDeclined: no funds")
        with Session(migrated_engine) as session, session.begin():
            dead_letters.park(
                session, pending.Owed(**values), 8, error, "Traceback ...\nCardDeclined"
            )
            return dead_letters.list_letters(session, limit=1)[0].id

    return park


@pytest.fixture
def put(migrated_engine: Engine) -> Callable[..., int]:
    """Quarantines a message and returns its id."""

    def put(body: bytes, reason: str = "not JSON", **options: Any) -> int:
        with Session(migrated_engine) as session, session.begin():
            return quarantine.put(session, "billing", body, reason, **options)

    return put


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def owed(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT * FROM outbox.pending_delivery")))


def rows(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text(f"SELECT count(*) FROM outbox.{table}")) or 0)


# ---- dead letters ----


def test_dead_letters_are_listed_newest_first_with_the_total(
    run_outbox: Outbox, park: Callable[..., int]
) -> None:
    ids = [park(key=f"o{number}") for number in range(3)]
    listed = document(run_outbox("dead", "list", "--limit", "2", "--json"))
    assert listed["total"] == 3
    assert [each["id"] for each in listed["dead_letters"]] == [ids[2], ids[1]]
    page = document(run_outbox("dead", "list", "--before", str(ids[1]), "--json"))
    assert [each["id"] for each in page["dead_letters"]] == [ids[0]]


def test_the_list_says_how_many_wait_behind_an_ordered_dead_letter(
    run_outbox: Outbox, park: Callable[..., int], migrated_engine: Engine
) -> None:
    park(key="o1", key_seq=3)
    behind = pending.Owed(
        "billing", "billing.bill", new_id(), "order.placed", b"{}", key="o1", key_seq=4
    )
    with Session(migrated_engine) as session, session.begin():
        pending.owe(session, behind, "early")
    (letter,) = document(run_outbox("dead", "list", "--json"))["dead_letters"]
    assert letter["held_up"] == 1
    assert "holds up" in run_outbox("dead", "list").stdout


def test_filters_narrow_the_list(run_outbox: Outbox, park: Callable[..., int]) -> None:
    park()
    other = park(handler="billing.refund", type="order.cancelled", key="o9")
    for filter_ in (
        ["--handler", "billing.refund"],
        ["--type", "order.cancelled"],
        ["--key", "o9"],
    ):
        listed = document(run_outbox("dead", "list", *filter_, "--json"))
        assert [each["id"] for each in listed["dead_letters"]] == [other]
    assert document(run_outbox("dead", "list", "--service", "x", "--json"))["total"] == 0


def test_show_prints_event_error_and_traceback(
    run_outbox: Outbox, park: Callable[..., int]
) -> None:
    id = park()
    printed = run_outbox("dead", "show", str(id)).stdout
    for words in ("billing.bill", "CardDeclined: no funds", "Traceback", '"total": 3'):
        assert words in printed
    shown = document(run_outbox("dead", "show", str(id), "--json"))
    assert json.loads(shown["envelope"])["data"] == {"total": 3}
    assert shown["attempts"] == 8


def test_what_an_event_holds_cannot_steer_the_terminal(
    run_outbox: Outbox, park: Callable[..., int]
) -> None:
    id = park(body=b"\x1b[2J[red]\xff\x00 not json", error="\x1b]0;owned\x07[bold]boo[/bold]")
    for command in (["dead", "show", str(id)], ["dead", "list"]):
        printed = run_outbox(*command).stdout
        assert "\x1b" not in printed
        assert "\x07" not in printed
        assert "[bold]boo[/bold]" in printed
    assert "[red]" in run_outbox("dead", "show", str(id)).stdout


def test_redrive_owes_the_delivery_again(
    run_outbox: Outbox, park: Callable[..., int], migrated_engine: Engine
) -> None:
    kept, redriven = park(), park()
    assert document(run_outbox("dead", "redrive", str(redriven), "--json")) == {"redriven": 1}
    (row,) = owed(migrated_engine)
    assert (row.handler, row.reason, row.attempts) == ("billing.bill", "redrive", 0)
    listed = document(run_outbox("dead", "list", "--json"))["dead_letters"]
    assert [each["id"] for each in listed] == [kept]


def test_a_group_is_redriven_after_the_count_was_confirmed(
    run_outbox: Outbox, park: Callable[..., int], migrated_engine: Engine
) -> None:
    for _ in range(3):
        park(type="order.placed")
    park(type="order.cancelled")
    refused = run_outbox("dead", "redrive", "--type", "order.placed")
    assert refused.exit_code == 1
    assert "Redrive 3 dead letters?" in refused.output
    assert owed(migrated_engine) == []
    done = run_outbox("dead", "redrive", "--type", "order.placed", "--limit", "2", "--yes")
    assert done.exit_code == 0
    assert "2 redriven" in done.stdout
    assert len(owed(migrated_engine)) == 2


def test_everything_is_only_meant_when_said(
    run_outbox: Outbox, park: Callable[..., int], migrated_engine: Engine
) -> None:
    park()
    assert run_outbox("dead", "redrive", "--yes").exit_code == 2
    assert run_outbox("dead", "discard", "--reason", "x", "--yes").exit_code == 2
    assert rows(migrated_engine, "dead_letter") == 1
    assert run_outbox("dead", "redrive", "--all", "--yes").exit_code == 0
    assert rows(migrated_engine, "dead_letter") == 0


def test_discard_needs_a_reason_and_logs_it(
    run_outbox: Outbox,
    park: Callable[..., int],
    migrated_engine: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    id = park()
    assert run_outbox("dead", "discard", str(id)).exit_code == 2
    assert rows(migrated_engine, "dead_letter") == 1
    done = run_outbox("dead", "discard", str(id), "--reason", "customer left", "--json")
    assert document(done) == {"discarded": 1}
    assert "customer left" in caplog.text
    assert rows(migrated_engine, "dead_letter") == rows(migrated_engine, "pending_delivery") == 0


@pytest.mark.parametrize("verb", [["show"], ["redrive"], ["discard", "--reason", "x"]])
def test_a_dead_letter_that_is_not_there_exits_1(run_outbox: Outbox, verb: list[str]) -> None:
    result = run_outbox("dead", verb[0], "77", *verb[1:])
    assert result.exit_code == 1
    assert "no dead letter 77" in result.output
    as_json = run_outbox("dead", verb[0], "77", *verb[1:], "--json")
    assert as_json.exit_code == 1
    assert "no dead letter 77" in json.loads(as_json.stdout)["error"]


def test_a_database_without_tables_is_said_to_be_one(make_database: Callable[[], str]) -> None:
    environment = {"OUTBOX_DATABASE_URL": make_database()}
    result = CliRunner(env=environment).invoke(main, ["dead", "list"])
    assert result.exit_code == 1
    assert "dead_letter" in result.output
    assert "Traceback" not in result.output


# ---- quarantine ----


def test_quarantined_messages_are_listed_with_reason_and_count(
    run_outbox: Outbox, put: Callable[..., int]
) -> None:
    first = put(b"\x80pickle")
    put(b"\x80pickle")
    second = put(b"{", "no envelope")
    listed = document(run_outbox("quarantine", "list", "--json"))["quarantined"]
    assert [(each["id"], each["times_seen"]) for each in listed] == [(second, 1), (first, 2)]
    assert "no envelope" in run_outbox("quarantine", "list").stdout


def test_a_quarantined_message_is_shown_as_bytes_and_never_run(
    run_outbox: Outbox, put: Callable[..., int]
) -> None:
    id = put(b"\x80\x04cos\nsystem\n\x1b[2J", headers={"task": "evil"})
    printed = run_outbox("quarantine", "show", str(id)).stdout
    assert "\\x80\\x04cos" in printed
    assert "evil" in printed
    assert "\x1b" not in printed
    assert document(run_outbox("quarantine", "show", str(id), "--json"))["bytes"] == 17


def test_a_large_body_is_cut_on_the_screen_and_says_so(
    run_outbox: Outbox, put: Callable[..., int]
) -> None:
    id = put(b"x" * 100_000)
    printed = run_outbox("quarantine", "show", str(id)).stdout
    assert "83,616 more bytes" in printed
    assert len(printed) < 20_000


def test_a_quarantined_message_is_fed_through_again_when_confirmed(
    run_outbox: Outbox, put: Callable[..., int], migrated_engine: Engine
) -> None:
    id = put(b'{"readable": "after a deploy"}')
    assert run_outbox("quarantine", "redrive", str(id)).exit_code == 1
    assert owed(migrated_engine) == []
    assert run_outbox("quarantine", "redrive", str(id), "--yes").exit_code == 0
    (row,) = owed(migrated_engine)
    assert bytes(row.body) == b'{"readable": "after a deploy"}'
    assert rows(migrated_engine, "quarantine") == 0


def test_a_message_that_was_cut_off_cannot_be_fed_through(
    run_outbox: Outbox, put: Callable[..., int], migrated_engine: Engine
) -> None:
    id = put(b"x" * (quarantine.MAX_BODY_BYTES + 1))
    result = run_outbox("quarantine", "redrive", str(id), "--yes", "--json")
    assert result.exit_code == 1
    assert "cut off" in json.loads(result.stdout)["error"]
    assert rows(migrated_engine, "quarantine") == 1


def test_a_quarantined_message_is_discarded_with_a_reason(
    run_outbox: Outbox, put: Callable[..., int], migrated_engine: Engine
) -> None:
    id = put(b"junk")
    assert run_outbox("quarantine", "discard", str(id)).exit_code == 2
    assert run_outbox("quarantine", "discard", str(id), "--reason", "spam").exit_code == 0
    assert rows(migrated_engine, "quarantine") == 0
    assert run_outbox("quarantine", "discard", str(id), "--reason", "spam").exit_code == 1
