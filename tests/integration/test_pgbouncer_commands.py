"""The commands through a real pgbouncer in transaction mode: each does there what it does without one.

What they say and change, tests of their own show. Here they run statements often enough to be prepared, in sessions
that the pooler gives them in turn.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import click
import kombu
import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, make_url
from sqlalchemy.orm import Session

import outbox
import outbox.cli
import saga.cli
from outbox import auditing, dead_letters, pending, quarantine
from outbox.ids import new_id
from tests import stages
from tests.local_servers import LocalPgBouncer
from tests.losing import Once, Pair, is_roll, number_of
from tests.sagas import Shop
from tests.stages import Scene
from tests.workers import eventually


class Pooled:
    """Runs commands on databases that it names by way of the pooler."""

    def __init__(self, pooler: LocalPgBouncer) -> None:
        self._pooler = pooler

    def url(self, engine: Engine) -> str:
        return self._pooler.url_of(engine.url.render_as_string(hide_password=False))

    def client(self, engine: Engine, *, autocommit: bool = False) -> psycopg.Connection[Any]:
        url = make_url(self.url(engine)).set(drivername="postgresql")
        return psycopg.connect(url.render_as_string(hide_password=False), autocommit=autocommit)

    @contextmanager
    def shared(self, engine: Engine) -> Iterator[None]:
        """Others use the pool of that database too, so it gives its sessions in no regular turn."""
        is_over = threading.Event()

        def use() -> None:
            with self.client(engine, autocommit=True) as connection:
                while not is_over.wait(0.001):
                    connection.execute("SELECT 1", prepare=False)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            for thread in threads:
                thread.join(30)

    def outbox(self, *arguments: object, on: Engine | None = None, exits: int = 0) -> Any:
        return self._run(outbox.cli.main, arguments, on, exits)

    def saga(self, *arguments: object, on: Engine, exits: int = 0) -> Any:
        return self._run(saga.cli.main, arguments, on, exits)

    def _run(
        self, main: click.Command, arguments: tuple[object, ...], on: Engine | None, exits: int
    ) -> Any:
        url = None if on is None else self.url(on)
        environment = {"OUTBOX_SCHEMA": None, "OUTBOX_DATABASE_URL": url}
        given = [*map(str, arguments), "--json"]
        result = CliRunner(env=environment).invoke(main, given)
        assert result.exit_code == exits, result.output
        return json.loads(result.stdout)


@pytest.fixture
def pooled(make_pooler: Callable[..., LocalPgBouncer], migrated_engine: Engine) -> Pooled:
    pooled = Pooled(make_pooler(migrated_engine.url.render_as_string(hide_password=False)))
    with pooled.client(migrated_engine) as one, pooled.client(migrated_engine) as other:
        one.execute("SELECT 1")  # opens both of its sessions, as both are needed at once
        other.execute("SELECT 1")
    return pooled


@pytest.fixture
def pair(make_migrated_database: Callable[[], str], make_engine: Callable[..., Engine]) -> Pair:
    return Pair(make_engine(make_migrated_database()), make_engine(make_migrated_database()))


def test_an_audit_and_its_repair(
    pooled: Pooled, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "_ROWS", 4)
    pair.wire.loses = Once(lambda message: is_roll(message) or number_of(message) in {3, 44})
    with pair.relaying(rolls=None):
        pair.publish(*range(60))
        eventually(lambda: len(pair.effects) == 58)
    databases = "--source", pooled.url(pair.source_engine), "--subscriber", pooled.url(pair.engine)
    found = pooled.outbox("audit", *databases, "--settle", 0, "--repair", exits=1)
    assert set(found["lines"][0]["first"]) == {one.id for one in pair.wire.lost}
    with pair.relaying(rolls=None):
        eventually(lambda: pair.effects == list(range(60)))
    assert pooled.outbox("audit", *databases, "--settle", 0)["missing"] == 0


def test_a_replay(pooled: Pooled, pair: Pair, redis_url: str) -> None:
    pair.publish(*range(6_000))
    command = ("replay", "--type", "thing.made", "--to", "stock", "--broker-url", redis_url)
    with pooled.shared(pair.source_engine):
        counted = pooled.outbox(*command, "--dry-run", on=pair.source_engine)
        assert counted == {"events": {"thing.made": 6_000}}
        assert pooled.outbox(*command, on=pair.source_engine)["sent"] == 6_000
    with kombu.Connection(redis_url) as connection:
        channel: Any = connection.default_channel
        assert channel.client.llen("stock.events") == 6_000


def parked(engine: Engine, count: int) -> None:
    """Dead letters of as many keys."""
    with Session(engine) as session, session.begin():
        for number in range(count):
            owed = pending.Owed(
                "billing", "billing.bill", new_id(), "order.placed", b"{}", key=f"o{number}"
            )
            dead_letters.park(session, owed, 8, "CardDeclined", "Traceback")


def test_dead_letters(pooled: Pooled, migrated_engine: Engine) -> None:
    parked(migrated_engine, 20)
    listed = pooled.outbox("dead", "list", on=migrated_engine)["dead_letters"]
    assert pooled.outbox("dead", "show", listed[0]["id"], on=migrated_engine)["key"] == "o19"
    redriven = pooled.outbox("dead", "redrive", "--key", "o3", "--yes", on=migrated_engine)
    assert redriven == {"redriven": 1}
    why = ("--reason", "not ours")
    assert pooled.outbox("dead", "discard", listed[0]["id"], *why, on=migrated_engine) == {
        "discarded": 1
    }
    rest = pooled.outbox("dead", "discard", "--all", "--yes", *why, on=migrated_engine)
    assert rest == {"discarded": 18}
    owed = pooled.outbox("status", on=migrated_engine)["pending"]
    assert [(each["reason"], each["deliveries"]) for each in owed] == [("redrive", 1)]


def test_quarantine(pooled: Pooled, migrated_engine: Engine) -> None:
    with Session(migrated_engine) as session, session.begin():
        for number in range(3):
            quarantine.put(session, "billing", b'{"number": %d}' % number, "no envelope")
    listed = pooled.outbox("quarantine", "list", on=migrated_engine)["quarantined"]
    first, second, _ = (each["id"] for each in listed)
    assert pooled.outbox("quarantine", "show", first, on=migrated_engine)["bytes"] == 13
    pooled.outbox("quarantine", "redrive", first, "--yes", on=migrated_engine)
    pooled.outbox("quarantine", "discard", second, "--reason", "spam", on=migrated_engine)
    left = pooled.outbox("status", on=migrated_engine, exits=1)["quarantined"]
    assert [each["messages"] for each in left] == [1]


def test_holes(pooled: Pooled, pair: Pair) -> None:
    pair.lose_for_good(1, of=(1, 2))
    (hole,) = pooled.outbox("holes", "list", on=pair.engine)["holes"]
    assert hole["event_id"] == pair.wire.lost[0].id
    why = ("--reason", "copied by hand", "--yes")
    assert pooled.outbox("holes", "forget", *why, on=pair.engine)["forgotten"] == 1


def test_tables_are_looked_at(pooled: Pooled, migrated_engine: Engine) -> None:
    pooled.outbox("migrate", "--check", on=migrated_engine)
    assert pooled.outbox("doctor", on=migrated_engine)["verdict"] != "FAIL"


def test_a_restored_log_is_adopted(pooled: Pooled, pair: Pair) -> None:
    pair.publish(*range(20))
    pair.run("INSERT INTO outbox.outbox_cluster VALUES (1)", pair.source_engine)
    assert pooled.outbox("adopt-cluster", "--yes", on=pair.source_engine) == {"adopted": "outbox"}
    with pair.relaying(rolls=None):
        eventually(lambda: pair.effects == list(range(20)))


# ---- sagas ----


@pytest.fixture
def shop(migrated_engine: Engine) -> Shop:
    return Shop(migrated_engine, unwind="eager")


def stuck(shop: Shop, failing: str, *rejected_by: str) -> UUID:
    shop.failures[failing] = 2
    saga_id = shop.start(*rejected_by)
    if rejected_by:
        shop.deliver("order.created", "inventory")
    shop.play.settle()
    return saga_id


def test_a_stuck_step_is_shown_and_resumed(pooled: Pooled, shop: Shop) -> None:
    saga_id = stuck(shop, "inventory.do")
    on = shop.engine
    assert {one["saga_id"] for one in pooled.saga("list", on=on)} == {str(saga_id)}
    assert {one["saga_id"] for one in pooled.saga("stuck", on=on, exits=1)} == {str(saga_id)}
    states = {one["step"]: one["state"] for one in pooled.saga("show", saga_id, on=on)["steps"]}
    assert states["act"] == "stuck"
    (told,) = pooled.saga("resume", saga_id, on=on)["resumed"]
    assert told["step"] == "act"
    shop.play.settle()
    assert set(shop.states(saga_id).values()) == {"completed"}
    assert pooled.saga("stuck", on=on) == []


def test_a_running_saga_is_aborted(pooled: Pooled, shop: Shop) -> None:
    saga_id = shop.start()
    shop.deliver("order.created", "inventory")
    told = pooled.saga("abort", saga_id, "--reason", "the customer called", on=shop.engine)
    assert told["aborted_by"] == "order"
    shop.play.settle()
    assert set(shop.states(saga_id).values()) == {"compensated"}


def test_a_compensation_is_skipped(pooled: Pooled, shop: Shop) -> None:
    saga_id = stuck(shop, "inventory.undo", "shipping")
    why = ("--participant", "inventory", "--reason", "put back by hand")
    pooled.saga("skip-compensation", saga_id, "act", *why, on=shop.engine)
    shop.play.settle()
    assert set(shop.states(saga_id).values()) == {"compensated"}


def test_a_call_outside_is_resolved(pooled: Pooled, migrated_engine: Engine) -> None:
    stages.an_unresolved_charge(Scene(migrated_engine, migrated_engine))
    saying = ("charge", "--did-not-happen", "--reason", "the bank says so")
    told = pooled.saga("resolve", stages.SAGA_ID, *saying, on=migrated_engine)
    assert told["happened"] is False


def test_peers_are_listed_and_retired(pooled: Pooled, shop: Shop) -> None:
    def who_wait_for_shipping() -> set[str]:
        known = pooled.saga("peers", on=shop.engine)
        return {one["participant"] for one in known if one["peer"] == "shipping"} - {"shipping"}

    assert who_wait_for_shipping() == {"order", "inventory", "users"}
    pooled.saga("retire", "shipping", on=shop.engine)
    assert who_wait_for_shipping() == set()
