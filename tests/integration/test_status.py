"""`outbox status` counts what the relay would still send, and says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Connection, Engine, text

from outbox.cli import main
from outbox.status import Standing, read_standing

RELAY = uuid4()


class Log:
    """The log of one database, written as publishers and relays write it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def publish(self, connection: Connection, *, lane: int = 0, age: float = 0) -> None:
        connection.execute(
            text(
                "INSERT INTO outbox.outbox_event (lane, event_id, type, version, body, occurred_at)"
                " VALUES (:lane, gen_random_uuid(), 't', 1, '', clock_timestamp() - :age)"
            ),
            {"lane": lane, "age": timedelta(seconds=age)},
        )

    def store_cursor(self, *, lane: int = 0) -> None:
        """Everything that is visible now is delivered."""
        self._run(
            "INSERT INTO outbox.outbox_cursor (slot, lane, epoch, seq, hi, snapshot) "
            "SELECT 0, :lane, 1, coalesce((SELECT max(seq) FROM outbox.outbox_cursor), 0) + 1,"
            " coalesce((SELECT max(position) FROM outbox.outbox_event WHERE lane = :lane), 0),"
            " pg_current_snapshot()",
            lane=lane,
        )

    def hold_lanes(self, *, alive: bool = True) -> None:
        self._run(
            "INSERT INTO outbox.outbox_lease (lane, epoch, relay_id) "
            "SELECT lane, 1, :relay FROM generate_series(0, 15) AS lane",
            relay=RELAY,
        )
        self._run(
            "INSERT INTO outbox.outbox_heartbeat VALUES (:relay, 1, clock_timestamp() + :left, 'h')",
            relay=RELAY,
            left=timedelta(minutes=1 if alive else -1),
        )

    def owe(self, *, due_in: float) -> None:
        self._run(
            "INSERT INTO outbox.pending_delivery (service, handler, event_id, reason, type, body,"
            " next_attempt_at) VALUES ('billing', 'h', gen_random_uuid(), 'retry', 't', '',"
            " clock_timestamp() + :due_in)",
            due_in=timedelta(seconds=due_in),
        )

    def standing(self) -> Standing:
        with self.engine.connect() as connection:
            return read_standing(connection)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self.engine.begin() as connection:
            yield connection

    def _run(self, sql: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(sql), values)


@pytest.fixture
def log(migrated_engine: Engine) -> Log:
    return Log(migrated_engine)


@pytest.fixture
def run_outbox(migrated_database_url: str) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        environment = {"OUTBOX_DATABASE_URL": migrated_database_url}
        return CliRunner(env=environment).invoke(main, ["status", *arguments])

    return run


def problems(standing: Standing, patience: float = 60) -> list[str]:
    return list(standing.problems(timedelta(seconds=patience)))


def test_an_empty_log_has_nothing_waiting_and_no_problem(log: Log) -> None:
    standing = log.standing()
    assert [lane.lane for lane in standing.lanes] == list(range(16))
    assert (standing.waiting, standing.oldest, problems(standing)) == (0, None, [])


def test_before_the_first_cursor_everything_waits(log: Log) -> None:
    with log.transaction() as connection:
        for lane in (0, 0, 7):
            log.publish(connection, lane=lane)
    assert {lane.lane: lane.waiting for lane in log.standing().lanes if lane.waiting} == {
        0: 2,
        7: 1,
    }


def test_what_the_cursor_has_passed_does_not_wait(log: Log) -> None:
    with log.transaction() as connection:
        log.publish(connection)
    log.store_cursor()
    assert log.standing().waiting == 0
    with log.transaction() as connection:
        log.publish(connection)
    assert log.standing().waiting == 1


def test_a_straggler_below_the_cursor_waits_once_it_has_committed(log: Log) -> None:
    with log.engine.connect() as slow, slow.begin():
        log.publish(slow, age=30)
        with log.transaction() as connection:
            log.publish(connection)
        log.store_cursor()
        assert log.standing().waiting == 0
        slow.commit()
    standing = log.standing()
    assert standing.waiting == 1
    assert standing.oldest is not None
    assert standing.oldest > timedelta(seconds=29)


def test_a_transaction_above_the_snapshot_with_a_lower_position_waits_too(log: Log) -> None:
    with log.engine.connect() as older, log.engine.connect() as newer:
        older.begin()
        newer.begin()
        older.execute(text("SELECT pg_current_xact_id()"))
        log.publish(newer)
        log.publish(older)
        older.commit()
        log.store_cursor()
        newer.commit()
    assert log.standing().waiting == 1


def test_the_age_is_that_of_the_oldest_in_any_lane(log: Log) -> None:
    with log.transaction() as connection:
        log.publish(connection, lane=1, age=5)
        log.publish(connection, lane=2, age=500)
    oldest = log.standing().oldest
    assert oldest is not None
    assert timedelta(seconds=500) <= oldest < timedelta(seconds=560)


def test_waiting_events_without_a_living_relay_are_a_problem(log: Log) -> None:
    with log.transaction() as connection:
        log.publish(connection)
    assert problems(log.standing()) == [
        "1 event in lanes that no relay holds: start `outbox relay`"
    ]
    log.hold_lanes(alive=False)
    assert "no relay holds" in problems(log.standing())[0]


def test_waiting_events_under_a_living_relay_are_a_problem_only_after_a_while(log: Log) -> None:
    log.hold_lanes()
    with log.transaction() as connection:
        log.publish(connection, age=90)
    standing = log.standing()
    assert standing.relays == {RELAY}
    assert problems(standing, patience=600) == []
    assert "has waited for 9" in problems(standing)[0]


def test_overdue_deliveries_are_a_problem_and_later_ones_are_not(log: Log) -> None:
    log.owe(due_in=300)
    assert problems(log.standing()) == []
    log.owe(due_in=-300)
    assert problems(log.standing()) == ["1 delivery overdue: is a worker of their service running?"]


def test_the_command_exits_1_with_the_reason_and_0_when_all_is_well(
    log: Log, run_outbox: Callable[..., Result]
) -> None:
    well = run_outbox()
    assert well.exit_code == 0
    assert "OK nothing waits; 0 relays running" in well.stdout
    with log.transaction() as connection:
        log.publish(connection)
    ill = run_outbox("--json")
    assert ill.exit_code == 1
    document = json.loads(ill.stdout)
    assert document["waiting"] == 1
    assert document["problems"] == problems(log.standing())
    assert [lane["waiting"] for lane in document["lanes"]] == [1] + [0] * 15


def test_the_command_shows_what_needs_a_person(log: Log, run_outbox: Callable[..., Result]) -> None:
    with log.transaction() as connection:
        connection.execute(
            text(
                "INSERT INTO outbox.dead_letter (service, handler, event_id, type, body, attempts,"
                " error, traceback) VALUES ('s', 's.bill', gen_random_uuid(), 't', '', 8, 'e', 't')"
            )
        )
        connection.execute(
            text(
                "INSERT INTO outbox.quarantine (service, digest, reason, headers, body)"
                " VALUES ('s', '', 'r', '{}', '')"
            )
        )
    log.owe(due_in=100)
    printed = run_outbox().stdout
    for words in ("1 dead letter:", "s.bill", "1 message in quarantine", "retry", "in 1 min"):
        assert words in printed


def test_a_database_without_tables_is_a_problem_with_a_command(
    make_database: Callable[[], str],
) -> None:
    environment = {"OUTBOX_DATABASE_URL": make_database()}
    result = CliRunner(env=environment).invoke(main, ["status"])
    assert result.exit_code == 1
    assert "outbox migrate --schema outbox" in result.output
