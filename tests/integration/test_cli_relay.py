"""`outbox relay` as a real process: it carries, waits, stops when told, at once if told twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
from kombu import Connection
from sqlalchemy import Engine, NullPool, create_engine, text

import outbox.schema
from outbox.buses import Topology
from outbox.buses.topology import declare
from outbox.lanes import Leases
from tests.installed import ROOT
from tests.integration.test_relay import conninfo
from tests.integration.test_spread import shares
from tests.local_servers import LocalPostgres, await_condition

MAIN = "from outbox.cli import main; main(prog_name='outbox')"
IN_A_HURRY = f"import outbox.relay; outbox.relay._CHORES_EVERY = 0.2; {MAIN}"


class Process:
    """A running `outbox relay`, with what it has said so far."""

    def __init__(
        self, arguments: tuple[str, ...], environment: dict[str, str], main: str = MAIN
    ) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", main, "relay", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.said += line

    def await_words(self, words: str) -> None:
        await_condition(lambda: words in self.said, within=30, what=f"{words!r} in {self.said!r}")

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self, within: float = 20) -> tuple[int, str]:
        """The exit code and what it printed."""
        code = self.popen.wait(within)
        self._reader.join(5)
        assert self.popen.stdout is not None
        return code, self.popen.stdout.read()


@pytest.fixture
def start_relay(unique_name: str) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(database_url: str, broker_url: str, *arguments: str, main: str = MAIN) -> Process:
        environment = {
            "OUTBOX_DATABASE_URL": database_url,
            "OUTBOX_BROKER_URL": broker_url,
            "OUTBOX_EXCHANGE": unique_name,
        }
        started.append(Process(arguments, environment, main))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()


@pytest.fixture
def topology(unique_name: str) -> Topology:
    return Topology(f"{unique_name}.events", ("order.placed",), unique_name, "classic")


def publish(engine: Engine, events: int) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbox.outbox_event (lane, event_id, type, version, body) "
                "SELECT i % 16, gen_random_uuid(), 'order.placed', 1, convert_to('{}', 'UTF8') "
                "FROM generate_series(1, :events) AS i"
            ),
            {"events": events},
        )


def arrived(broker_url: str, queue: str) -> int:
    with Connection(broker_url) as connection:
        try:
            answer = connection.default_channel.queue_declare(queue, passive=True)
        except connection.channel_errors:
            return 0  # on Redis an empty queue is none
        return int(answer.message_count)


def arrived_ids(redis_url: str, queue: str) -> set[str]:
    with Connection(redis_url) as connection:
        messages = connection.default_channel.client.lrange(queue, 0, -1)
        return {json.loads(message)["headers"]["id"] for message in messages}


def await_arrival(broker_url: str, queue: str, events: int) -> None:
    await_condition(
        lambda: arrived(broker_url, queue) == events,
        within=30,
        every=0.2,
        what=f"{events} events in {queue}",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_carries_events_until_told_to_stop_and_tells_how_many(
    migrated_database_url: str,
    migrated_engine: Engine,
    bus_url: str,
    topology: Topology,
    start_relay: Callable[..., Process],
    number: signal.Signals,
) -> None:
    declare(bus_url, topology)
    publish(migrated_engine, 40)
    relay = start_relay(migrated_database_url, bus_url, "--json")
    await_arrival(bus_url, topology.queue, 40)
    publish(migrated_engine, 2)
    await_arrival(bus_url, topology.queue, 42)
    relay.signal(number)
    code, printed = relay.end()
    assert code == 0, relay.said
    assert json.loads(printed) == {
        "sent": 42, "confirmed": 42, "failures": 0, "refusals": 0, "unrouted": {},
    }  # fmt: skip
    with migrated_engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM outbox.outbox_heartbeat")) == 0


def test_it_tells_of_events_that_no_queue_is_bound_to(
    migrated_database_url: str,
    migrated_engine: Engine,
    rabbitmq_url: str,
    topology: Topology,
    start_relay: Callable[..., Process],
) -> None:
    declare(rabbitmq_url, replace(topology, bindings=("order.cancelled",)))
    publish(migrated_engine, 3)
    relay = start_relay(migrated_database_url, rabbitmq_url, "--mandatory", "--json")
    relay.await_words("events of type order.placed")
    relay.signal(signal.SIGTERM)
    code, printed = relay.end()
    assert code == 0, relay.said
    assert json.loads(printed)["unrouted"] == {"order.placed": 3}


def test_a_second_signal_ends_it_at_once_and_loses_nothing(
    migrated_database_url: str,
    migrated_engine: Engine,
    redis_url: str,
    topology: Topology,
    start_relay: Callable[..., Process],
) -> None:
    declare(redis_url, topology)
    publish(migrated_engine, 5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        relay = start_relay(migrated_database_url, f"redis://127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(30)
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(1), "it has said something and waits for the answer"
            relay.signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                relay.popen.wait(1)
            relay.signal(signal.SIGTERM)
            assert relay.end(within=3)[0] == 128 + signal.SIGTERM
    start_relay(migrated_database_url, redis_url)
    await_arrival(redis_url, topology.queue, 5)


def test_it_waits_for_a_database_that_is_not_up_yet(
    private_postgres: LocalPostgres, redis_url: str, start_relay: Callable[..., Process]
) -> None:
    outbox.schema.upgrade_engine(create_engine(private_postgres.url, poolclass=NullPool))
    private_postgres.stop()
    relay = start_relay(private_postgres.url, redis_url)
    relay.await_words("trying again")
    private_postgres.start()
    relay.await_words("relaying schema 'outbox'")
    relay.signal(signal.SIGTERM)
    assert relay.end()[0] == 0


def test_it_can_be_stopped_while_it_waits_for_the_database(
    redis_url: str, start_relay: Callable[..., Process]
) -> None:
    relay = start_relay("postgresql://me:sesame@127.0.0.1:1/x", redis_url)
    relay.await_words("trying again")
    relay.signal(signal.SIGTERM)
    assert relay.end()[0] == 0
    assert "sesame" not in relay.said


def test_a_database_without_our_tables_is_a_mistake_and_not_waited_for(
    database_url: str, redis_url: str, start_relay: Callable[..., Process]
) -> None:
    relay = start_relay(database_url, redis_url)
    assert relay.end()[0] == 1
    assert "outbox migrate --schema outbox" in relay.said


def test_a_log_restored_from_another_cluster_stops_it_until_it_is_adopted(
    migrated_database_url: str,
    migrated_engine: Engine,
    redis_url: str,
    topology: Topology,
    start_relay: Callable[..., Process],
) -> None:
    declare(redis_url, topology)
    with migrated_engine.begin() as connection:
        connection.execute(text("INSERT INTO outbox.outbox_cluster (system_identifier) VALUES (1)"))
    publish(migrated_engine, 3)
    refused = start_relay(migrated_database_url, redis_url)
    assert refused.end()[0] == 1
    assert "outbox adopt-cluster" in refused.said
    assert arrived(redis_url, topology.queue) == 0
    assert run_outbox("adopt-cluster", migrated_database_url).returncode == 1, "asks first"
    adopted = run_outbox("adopt-cluster", migrated_database_url, "--yes")
    assert adopted.returncode == 0, adopted.stderr
    start_relay(migrated_database_url, redis_url)
    await_arrival(redis_url, topology.queue, 3)


@pytest.mark.parametrize(
    ("broker", "code", "said"),
    [("gopher://x", 1, "names no broker"), ("", 2, "--broker-url")],
)
def test_a_broker_that_cannot_be_one_is_said_at_the_start(
    migrated_database_url: str,
    start_relay: Callable[..., Process],
    broker: str,
    code: int,
    said: str,
) -> None:
    relay = start_relay(migrated_database_url, broker)
    assert relay.end()[0] == code
    assert said in relay.said


def test_it_drops_what_all_have_delivered_and_is_older_than_its_retention_while_it_relays(
    migrated_database_url: str,
    migrated_engine: Engine,
    redis_url: str,
    topology: Topology,
    start_relay: Callable[..., Process],
) -> None:
    """Of three partitions it drops the one, the second when another relay has delivered its part, the young one not."""
    old, half, young = (f"outbox_event_p{start:012d}" for start in (0, 1_000_000, 2_000_000))

    published: set[str] = set()

    def insert(after: int, *, lanes: int, age: int) -> None:
        with migrated_engine.begin() as connection:
            ids = connection.scalars(
                text(
                    "INSERT INTO outbox.outbox_event (position, lane, event_id, type, version, body, occurred_at) "
                    "SELECT :after + i, mod(i, :lanes), gen_random_uuid(), 'order.placed', 1, '{}', "
                    "now() - make_interval(days => :age) FROM generate_series(1, 32) AS i RETURNING event_id::text"
                ),
                {"after": after, "lanes": lanes, "age": age},
            )
            published.update(ids)

    def go_to(position: int) -> None:
        with migrated_engine.begin() as connection:
            connection.execute(
                text("SELECT setval('outbox.outbox_event_position', :position)"),
                {"position": position},
            )

    def kept() -> set[str]:
        names = "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
        with migrated_engine.connect() as connection:
            return set(connection.scalars(text(names)))

    def await_that(condition: Callable[[], bool]) -> None:
        await_condition(condition, within=30, what=f"it in {kept()} {relay.said}")

    def rounds() -> int:
        stored = "SELECT count(*) FROM outbox.outbox_cursor WHERE lane = 0"
        with migrated_engine.connect() as connection:
            return int(connection.execute(text(stored)).scalar_one())

    declare(redis_url, topology)
    relay = start_relay(migrated_database_url, redis_url, "--retention", "1", main=IN_A_HURRY)
    await_that(lambda: shares(migrated_engine) == [16])
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        other = Leases(connection, time_to_live=timedelta(minutes=1))

        def has_its_share() -> bool:
            other.beat()
            return len(other.held) == 8

        await_that(has_its_share)
        insert(0, lanes=8, age=2)
        insert(1_000_000, lanes=16, age=2)
        go_to(1_500_000)
        await_that(lambda: young in kept())
        insert(2_000_000, lanes=8, age=0)
        go_to(3_100_000)
        await_that(lambda: old not in kept())
        before = rounds()
        await_that(lambda: rounds() >= before + 2)
        assert {half, young} <= kept()
        other.release()
    await_that(lambda: published <= arrived_ids(redis_url, topology.queue))
    await_that(lambda: half not in kept())
    relay.signal(signal.SIGTERM)
    assert relay.end()[0] == 0, relay.said
    assert young in kept()


def run_outbox(
    command: str, database_url: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, command, *arguments],
        cwd=ROOT,
        env={**os.environ, "OUTBOX_DATABASE_URL": database_url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
