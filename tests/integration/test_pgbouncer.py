"""Everything through a real pgbouncer in transaction mode, which gives two statements of one client to two sessions.

It has two sessions for each database, and takes them in turn.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from kombu import Connection
from pydantic import BaseModel
from sqlalchemy import Engine, make_url
from sqlalchemy.orm import Session

import outbox
from outbox.buses import open_bus
from outbox.buses.topology import Topology, declare
from outbox.cursors import CursorStore
from outbox.doctor.database import examine_database
from outbox.errors import LeaseLost
from outbox.events import Registry
from outbox.lanes import Leases
from outbox.partitions import Partitions
from outbox.pooler import is_pooled, mind_poolers
from outbox.reader import Cursor, LogReader
from outbox.relay import Relay
from outbox.schema import check, component, upgrade_engine
from tests.installed import ROOT
from tests.integration.test_spread import shares
from tests.local_servers import LocalPgBouncer
from tests.workers import Billing, eventually

UNPREPARED = {"prepare_threshold": None}
MAIN = "from outbox.cli import main; main(prog_name='outbox')"


def libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def spread(pooler: LocalPgBouncer) -> None:
    """Make the pooler open both of its sessions, by needing them at once."""
    with psycopg.connect(libpq(pooler.url)) as one, psycopg.connect(libpq(pooler.url)) as other:
        one.execute("SELECT 1")
        other.execute("SELECT 1")


@pytest.fixture
def pooler(
    make_pooler: Callable[..., LocalPgBouncer], migrated_database_url: str
) -> LocalPgBouncer:
    """In front of a database with all tables."""
    pooler = make_pooler(migrated_database_url)
    spread(pooler)
    return pooler


@pytest.fixture
def connection(pooler: LocalPgBouncer) -> Iterator[psycopg.Connection[Any]]:
    """As a relay connects: in autocommit, through the pooler."""
    with psycopg.connect(libpq(pooler.url), autocommit=True, **UNPREPARED) as connection:
        yield connection


def test_the_statements_of_one_client_do_run_in_two_sessions(
    connection: psycopg.Connection[Any],
) -> None:
    """Or the other tests here would show nothing."""
    sessions = {connection.execute("SELECT pg_backend_pid()").fetchone() for _ in range(4)}
    assert len(sessions) == 2


def test_a_pooler_is_noticed(
    connection: psycopg.Connection[Any], migrated_database_url: str
) -> None:
    assert is_pooled(connection)
    with psycopg.connect(libpq(migrated_database_url), autocommit=True) as direct:
        assert not is_pooled(direct)


def test_a_relay_leaves_no_setting_behind_in_its_sessions(
    pooler: LocalPgBouncer, migrated_database_url: str
) -> None:
    for url, mode in ((pooler.url, "auto"), (migrated_database_url, "force_generic_plan")):
        with Relay(url, open_bus("redis://127.0.0.1:1/0"))._connect_to_read() as reading:
            assert {reading.execute("SHOW plan_cache_mode").fetchone() for _ in range(4)} == {
                (mode,)
            }


def test_engines_of_our_own_prepare_nothing_behind_it(
    pooler: LocalPgBouncer, migrated_engine: Engine, make_engine: Callable[..., Engine]
) -> None:
    with mind_poolers(make_engine(pooler.url)).connect() as pooled:
        assert pooled.connection.driver_connection is not None
        assert pooled.connection.driver_connection.prepare_threshold is None
        assert not pooled.connection.driver_connection.autocommit
    with mind_poolers(migrated_engine).connect() as direct:
        assert direct.connection.driver_connection is not None
        assert direct.connection.driver_connection.prepare_threshold == 5


# ---- the log ----

registry = Registry()


@registry.event("thing.made", key="key", ordered=True)
class Made(BaseModel):
    number: int
    key: int


def test_events_published_through_it_can_be_read_through_it(
    pooler: LocalPgBouncer, connection: psycopg.Connection[Any], make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(pooler.url, connect_args=UNPREPARED)
    for number in range(0, 20, 2):
        with Session(engine) as session, session.begin():
            outbox.publish(session, Made(number=number, key=number % 3), registry=registry)
        with psycopg.connect(libpq(pooler.url), **UNPREPARED) as writer:
            outbox.publish(writer, Made(number=number + 1, key=number % 3), registry=registry)
    reader, cursor = LogReader(connection), Cursor.at_beginning(range(16))
    numbers = []
    complete = False
    while not complete:
        page = reader.read(cursor, 2)
        numbers += [json.loads(event.body)["data"]["number"] for event in page.events]
        cursor, complete = page.cursor, page.complete
    assert sorted(numbers) == list(range(20))


def test_leases_and_cursors_rest_on_no_session(connection: psycopg.Connection[Any]) -> None:
    dead, heir = (Leases(connection, time_to_live=timedelta(seconds=1)) for _ in range(2))
    dead.beat()
    store = CursorStore(connection)
    for position in range(1, 300):
        store.store(Cursor(dict.fromkeys(range(16), position)), dead.held)
        store.rotate(when_over=200)
    assert sorted(dead.held) == list(range(16))

    def took_over() -> bool:
        heir.beat()
        return len(heir.held) == 16

    eventually(took_over)
    with pytest.raises(LeaseLost):
        store.store(Cursor(dict.fromkeys(range(16), 1)), dead.held)
    (cursor,) = CursorStore(connection).load(range(16))
    assert cursor.his == dict.fromkeys(range(16), 299)


def test_partitions_are_made_and_dropped_through_it(
    pooler: LocalPgBouncer, connection: psycopg.Connection[Any], make_engine: Callable[..., Engine]
) -> None:
    partitions = Partitions(connection, retention=timedelta(0))
    leases = Leases(connection)
    leases.beat()
    with Session(make_engine(pooler.url, connect_args=UNPREPARED)) as session, session.begin():
        outbox.publish(session, Made(number=1, key=1), registry=registry)
    connection.execute("SELECT setval('outbox.outbox_event_position', 2500000)")
    page = LogReader(connection).read(Cursor.at_beginning(range(16)), 10)
    CursorStore(connection).store(page.cursor, leases.held)

    partitions.maintain()

    bounds = partitions._bounds().values()
    assert min(lower for lower, _ in bounds) > 0
    assert max(upper for _, upper in bounds) > 4_000_000


# ---- processes ----


class Relays:
    """`outbox relay` processes that connect through the pooler."""

    def __init__(self, pooler: LocalPgBouncer, broker_url: str, exchange: str, log: Path) -> None:
        self._log = log
        self._environment = {
            **os.environ,
            "OUTBOX_DATABASE_URL": pooler.url,
            "OUTBOX_BROKER_URL": broker_url,
            "OUTBOX_EXCHANGE": exchange,
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", MAIN, "relay"]
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stderr=log)
        self.processes.append(process)
        return process

    @property
    def log(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def relays(
    pooler: LocalPgBouncer, redis_url: str, unique_name: str, tmp_path: Path
) -> Iterator[Relays]:
    relays = Relays(pooler, redis_url, unique_name, tmp_path / "relays.log")
    yield relays
    relays.close()


def test_relays_share_the_lanes_through_it_and_take_over_from_one_that_was_killed(
    pooler: LocalPgBouncer,
    relays: Relays,
    migrated_engine: Engine,
    make_engine: Callable[..., Engine],
    redis_url: str,
    unique_name: str,
) -> None:
    engine = make_engine(pooler.url, connect_args=UNPREPARED)
    declare(redis_url, Topology(f"{unique_name}.events", ("thing.made",), unique_name))

    published: set[str] = set()

    def publish(count: int) -> None:
        for number in range(count):
            with Session(engine) as session, session.begin():
                made = Made(number=number, key=number % 20)
                published.add(str(outbox.publish(session, made, registry=registry)))

    doomed = relays.start()
    relays.start()
    eventually(lambda: shares(migrated_engine) == [8, 8], 30, lambda: relays.log)
    publish(100)
    with Connection(redis_url) as broker:
        channel = broker.default_channel

        def arrived() -> set[str]:
            raw = channel.client.lrange(f"{unique_name}.events", 0, -1)
            headers = [json.loads(message)["headers"] for message in raw]
            return {each["id"] for each in headers}

        doomed.send_signal(signal.SIGKILL)
        began = time.monotonic()
        publish(100)
        eventually(lambda: published <= arrived(), explain=lambda: relays.log)
        assert time.monotonic() - began < 5
    assert shares(migrated_engine) == [16]
    assert len(published) == 200
    assert "prepared statement" not in relays.log
    assert "connecting again" not in relays.log


@pytest.mark.parametrize("batch", [(), ("--outbox-batch", "10")], ids=["one by one", "batches"])
def test_a_worker_handles_retries_and_parks_through_it(
    pooler: LocalPgBouncer,
    migrated_database_url: str,
    redis_url: str,
    tmp_path: Path,
    batch: tuple[str, ...],
) -> None:
    billing = Billing(migrated_database_url, redis_url, tmp_path)
    worker = billing.worker("--concurrency", "2", *batch, BILLING_DATABASE=pooler.url)
    try:
        orders = sorted(f"o{number}" for number in range(40))
        for order in orders:
            envelope = billing.placed(order)
            for _ in range(2):
                billing.send(envelope)
        billing.send(billing.placed("broken", do="fail"))
        parked = "SELECT error FROM outbox.dead_letter WHERE key = 'broken'"
        eventually(lambda: billing.rows(parked), 30, lambda: worker.log)
        billing.until_nothing_is_left()
        assert billing.effects == orders
        assert "prepared statement" not in worker.log
    finally:
        billing.close()


# ---- tools ----


def test_tables_are_made_through_it(
    make_pooler: Callable[..., LocalPgBouncer],
    database_url: str,
    make_engine: Callable[..., Engine],
) -> None:
    pooler = make_pooler(database_url)
    spread(pooler)
    engine = mind_poolers(make_engine(pooler.url))
    upgrade_engine(engine)
    with engine.connect() as connection:
        check(connection)


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_the_doctor_tells_its_mode(
    make_pooler: Callable[..., LocalPgBouncer],
    migrated_database_url: str,
    make_engine: Callable[..., Engine],
    mode: str,
) -> None:
    engine = mind_poolers(make_engine(make_pooler(migrated_database_url, mode=mode).url))
    (told,) = (one for one in examine_database(engine, [component]) if one.check == "pooler")
    assert f"{mode} mode" in told.found
