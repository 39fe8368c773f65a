"""Ordered events through real workers: a key that is redriven, and a service that begins with the past."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from outbox.cli import main
from tests.apps.ledger import Counted
from tests.ledgers import Bank, Ledger
from tests.workers import eventually


@pytest.fixture
def bank(broker_url: str, make_migrated_database: Callable[[], str]) -> Bank:
    return Bank(make_migrated_database(), broker_url)


@pytest.fixture
def make_ledger(
    bank: Bank, make_migrated_database: Callable[[], str], tmp_path: Path
) -> Iterator[Callable[[], Ledger]]:
    made: list[Ledger] = []

    def make() -> Ledger:
        made.append(Ledger(bank, make_migrated_database(), tmp_path))
        return made[-1]

    yield make
    for ledger in made:
        ledger.close()


def run(*arguments: str) -> Any:
    result = CliRunner(env={"OUTBOX_SCHEMA": None}).invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def dead(ledger: Ledger, verb: str, *options: str) -> Any:
    return run("dead", verb, "--database-url", ledger.database_url, *options)


def up_to(amount: int) -> list[int]:
    return list(range(1, amount + 1))


def xids(ledger: Ledger, *accounts: str) -> list[int]:
    """The transactions of their bookings."""
    rows = ledger.rows("SELECT account, xid::text FROM booking")
    return [int(row.xid) for row in rows if row.account in accounts]


@pytest.mark.parametrize("batch", [(), ("--outbox-batch", "10")], ids=["one by one", "batches"])
def test_a_key_that_is_redriven_is_booked_in_order_each_event_in_a_transaction_of_its_own(
    bank: Bank, make_ledger: Callable[[], Ledger], batch: tuple[str, ...]
) -> None:
    ledger = make_ledger()
    ledger.declare()
    ledger.refuse("a", 3)
    ledger.refuse("c", 1)
    with bank.relaying() as relay:
        bank.move("a", "b", "c", amounts=range(1, 9))
        bank.move("u", amounts=range(1, 21), cls=Counted)
        eventually(lambda: relay.stats.confirmed == bank.published)
        ledger.worker("--concurrency", "2", *batch)

        def is_at_rest() -> bool:
            held = {one["key"]: one["held_up"] for one in dead(ledger, "list")["dead_letters"]}
            return held == {"a": 5, "c": 7} and len(xids(ledger, "a", "b", "u")) == 2 + 8 + 20

        eventually(is_at_rest, 30, ledger.explain)
        ledger.run("DELETE FROM refused")
        assert dead(ledger, "redrive", "--key", "a", "--yes") == {"redriven": 1}
        eventually(lambda: ledger.booked()["a"] == up_to(8), 30, ledger.explain)

    booked = ledger.booked()
    assert (booked["a"], booked["b"], sorted(booked["u"])) == (up_to(8), up_to(8), up_to(20))
    assert "c" not in booked, "nobody has redriven that key"
    assert len(set(xids(ledger, "a", "b"))) == 16
    assert not set(xids(ledger, "a", "b")) & set(xids(ledger, "u"))
    if batch:
        assert len(set(xids(ledger, "u"))) < 20, "events without an order do share transactions"


def test_a_service_that_did_not_exist_yet_is_fed_the_whole_past_once_and_in_order(
    bank: Bank, make_ledger: Callable[[], Ledger]
) -> None:
    old = make_ledger()
    worker = old.worker("--concurrency", "1")
    with bank.relaying() as relay:
        bank.move("a", "b", amounts=range(1, 11))
        bank.move("u", amounts=range(1, 6), cls=Counted)
        eventually(lambda: by_account(old) == of_each(10), 30, old.explain)
        eventually(lambda: relay.stats.confirmed == bank.published)

        new = make_ledger()
        reader = new.worker("--concurrency", "2")
        assert (new.queued(), new.booked()) == (0, {}), "of itself it begins with what comes now"
        for _ in range(2):  # the second time its inbox has it all
            replayed = run(
                "replay", "--database-url", bank.engine.url.render_as_string(hide_password=False),
                "--broker-url", bank.broker_url, "--type", "money.moved", "--type", "money.counted",
                "--to", new.name,
            )  # fmt: skip
            assert (replayed["sent"], replayed["queue"]) == (25, f"{new.name}.events")
        eventually(lambda: by_account(new) == of_each(10), 30, new.explain)

        bank.move("a", "b", amounts=range(11, 13))
        eventually(lambda: by_account(new) == of_each(12), 30, new.explain)
        eventually(lambda: by_account(old) == of_each(12), 30, old.explain)
        # Those that came too early were sent a second time.
        eventually(lambda: reader.log.count("] succeeded") >= 2 * 25 + 4, 30, new.explain)
    assert by_account(new) == of_each(12)
    assert len(set(xids(new, "a", "b"))) == 24
    assert worker.log.count("] received") == bank.published == 29, "what is for another is not sent"
    assert dead(new, "list")["total"] == 0


def of_each(amount: int) -> dict[str, list[int]]:
    return {"a": up_to(amount), "b": up_to(amount), "u": up_to(5)}


def by_account(ledger: Ledger) -> dict[str, list[int]]:
    """What is booked, that without an order sorted."""
    booked = ledger.booked()
    return {**booked, "u": sorted(booked.get("u", []))}
