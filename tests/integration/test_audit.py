"""`outbox audit`, `replay` and `holes`: what is missing, from the databases alone, and how it is had after all."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import kombu
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import outbox
from outbox.buses.base import OutgoingMessage
from outbox.cli import main
from outbox.replaying import Replay, Selection
from tests.losing import Made, Once, Pair, Sold, is_roll, number_of, registry
from tests.workers import eventually


@pytest.fixture
def pair(make_migrated_database: Callable[[], str], make_engine: Callable[..., Engine]) -> Pair:
    return Pair(make_engine(make_migrated_database()), make_engine(make_migrated_database()))


def url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def run(*arguments: str) -> Result:
    return CliRunner(env={"OUTBOX_SCHEMA": None}).invoke(main, arguments)


def audit(pair: Pair, *options: str) -> tuple[int, dict[str, Any]]:
    result = run(
        "audit", "--source", url(pair.source_engine), "--subscriber", url(pair.engine),
        "--settle", "0", "--json", *options,
    )  # fmt: skip
    return result.exit_code, json.loads(result.stdout)


def by_type(document: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {line["type"]: (line["due"], line["missing"]) for line in document["lines"]}


def numbers_sent(pair: Pair) -> list[int]:
    return [number for one in pair.wire.sent if (number := number_of(one)) is not None]


def send(pair: Pair, numbers: int, selection: Selection) -> list[int]:
    """Replay to the subscriber; returns the numbers of the events that were sent, in order."""
    pair.wire.sent.clear()
    engine = pair.source_engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        replay = Replay(driver, selection, page_rows=numbers)
        assert sum(replay.count().values()) == sum(1 for _ in _sent(pair, replay))
    return numbers_sent(pair)


def _sent(pair: Pair, replay: Replay) -> list[OutgoingMessage]:
    for _ in replay.send(pair.wire, pair.subscriber.queue):
        pass
    return list(pair.wire.sent)


def test_the_audit_lists_exactly_what_is_missing_and_has_it_sent(pair: Pair) -> None:
    pair.fails_on = {6}
    pair.wire.loses = Once(lambda message: is_roll(message) or number_of(message) in {3, 4, 14})
    with pair.relaying(rolls=None):
        pair.publish(*range(10))
        pair.publish(*range(10, 15), cls=Sold)
        eventually(lambda: len(numbers_sent(pair)) == 15 and len(pair.effects) == 11)
    code, document = audit(pair)
    assert code == 1
    assert by_type(document) == {"thing.made": (10, 2), "thing.sold": (5, 1)}
    lost = {one.id for one in pair.wire.lost}
    assert {id for line in document["lines"] for id in line["first"]} == lost

    assert audit(pair, "--repair")[0] == 1
    with pair.relaying(rolls=None):
        eventually(lambda: len(pair.effects) == 14)
    code, document = audit(pair)
    assert (code, document["missing"]) == (0, 0)


def test_the_audit_leaves_out_what_is_not_sent_yet_and_what_is_older_than_the_subscription(
    pair: Pair,
) -> None:
    pair.run("DELETE FROM outbox.subscription")
    with pair.relaying(rolls=None):
        pair.wire.loses = lambda _: True
        pair.publish(1, 2)
        eventually(lambda: len(pair.wire.lost) == 2)
        pair.note()
        pair.publish(3)
        eventually(lambda: len(pair.wire.lost) == 3)
    pair.publish(4)
    assert by_type(audit(pair)[1]) == {"thing.made": (1, 1)}


def test_the_audit_of_what_nobody_has_noted_says_so(pair: Pair) -> None:
    pair.run("DELETE FROM outbox.subscription")
    result = run("audit", "--source", url(pair.source_engine), "--subscriber", url(pair.engine))
    assert result.exit_code == 1
    assert "nothing to compare" in result.stderr


@pytest.mark.parametrize("page_rows", [1, 3, 500])
def test_a_replay_sends_what_was_selected_in_order_and_the_inbox_decides(
    pair: Pair, page_rows: int
) -> None:
    with pair.relaying(rolls=None):
        pair.publish(*range(10))
        pair.publish(*range(10, 15), cls=Sold)
        eventually(lambda: len(pair.effects) == 15)
    assert send(pair, page_rows, Selection(["thing.made"])) == list(range(10))
    assert send(pair, page_rows, Selection(["thing.made", "thing.sold"])) == list(range(15))
    assert pair.effects == list(range(15))


def test_a_new_subscriber_is_fed_from_the_beginning(pair: Pair) -> None:
    pair.wire.loses = lambda _: True
    with pair.relaying(rolls=None):
        pair.publish(*range(30))
        eventually(lambda: len(pair.wire.lost) == 30)
    pair.wire.loses = lambda _: False
    assert send(pair, 7, Selection(["thing.made"])) == list(range(30))
    assert pair.effects == list(range(30))


def test_what_is_replayed_will_survive_a_crash_though_no_commit_was_waited_for(pair: Pair) -> None:
    pair.publish(*range(10))
    engine = pair.source_engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, engine.connect() as looking:
        driver: Any = connection.connection.driver_connection
        sending = Replay(driver, Selection(["thing.made"]), page_rows=1).send(pair.wire, "stock")
        for _ in range(10):
            # As the commits that nobody waits for; those wake who writes them.
            looking.execute(text("SELECT pg_logical_emit_message(false, 'test', 'not on disk')"))
            written = looking.scalar(text("SELECT pg_current_wal_insert_lsn()"))
            assert next(sending).sent == len(pair.wire.sent)
            kept = text("SELECT pg_current_wal_flush_lsn() >= CAST(:written AS pg_lsn)")
            assert looking.scalar(kept, {"written": written})


def test_a_replay_that_was_broken_off_goes_on_behind_a_position(pair: Pair) -> None:
    pair.publish(*range(20))
    engine = pair.source_engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        first = next(
            Replay(driver, Selection(["thing.made"]), page_rows=8).send(pair.wire, "stock.events")
        )
        rest = Selection(["thing.made"], after=first.position)
        last = list(Replay(driver, rest, page_rows=8).send(pair.wire, "stock.events"))[-1]
    assert (first.sent, first.sent + last.sent) == (8, 20)
    assert pair.effects == list(range(20))


def test_the_command_sends_to_the_service_named(
    pair: Pair, redis_url: str, unique_name: str
) -> None:
    pair.publish(*range(4))
    common = (
        "replay", "--database-url", url(pair.source_engine), "--broker-url", redis_url, "--json",
        "--type", "thing.made", "--to", unique_name,
    )  # fmt: skip
    counted = run(*common, "--since", "1h", "--dry-run")
    assert json.loads(counted.stdout) == {"events": {"thing.made": 4}}
    done = run(*common, "--since", "beginning")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sent"] == 4
    none = run(*common, "--since", "beginning", "--until", "2020-01-01T00:00")
    assert json.loads(none.stdout)["sent"] == 0
    with kombu.Connection(redis_url) as connection:
        assert connection.default_channel.client.llen(f"{unique_name}.events") == 4


def test_a_time_that_cannot_be_read_is_a_wrong_call(pair: Pair) -> None:
    result = run(
        "replay", "--database-url", url(pair.source_engine), "--broker-url", "redis://nowhere",
        "--type", "thing.made", "--to", "stock", "--since", "yesterday",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "beginning" in result.stderr


def test_holes_are_listed_and_what_is_gone_can_be_forgotten(pair: Pair) -> None:
    pair.lose_for_good(1, of=(1, 2))
    database = ("--database-url", url(pair.engine), "--json")
    (hole,) = json.loads(run("holes", "list", *database).stdout)["holes"]
    assert (hole["handler"], hole["type"]) == ("stock.count", "thing.made")
    status = json.loads(run("status", *database).stdout)
    assert status["missing"][0]["gone"] == 1
    assert any("outbox holes forget" in problem for problem in status["problems"])
    forgotten = run("holes", "forget", *database, "--reason", "copied by hand", "--yes")
    assert json.loads(forgotten.stdout) == {"forgotten": 1, "keys": 0}
    assert not pair.holes


def test_a_long_transaction_is_audited_once_it_has_been_sent(pair: Pair) -> None:
    slow = Session(pair.source_engine)
    slow.begin()
    savepoint = slow.begin_nested()
    outbox.publish(slow, Made(0, 0), registry=registry)
    savepoint.commit()
    with pair.relaying(rolls=timedelta(milliseconds=50)):
        pair.publish(1)
        eventually(lambda: len(pair.effects) == 1)
        eventually(lambda: by_type(audit(pair)[1]).get("thing.made") == (1, 0))
        slow.commit()
        slow.close()
        eventually(lambda: by_type(audit(pair)[1]).get("thing.made") == (2, 0))
    assert pair.rows("SELECT count(*) AS n FROM outbox.outbox_event", pair.source_engine)[0].n == 2
