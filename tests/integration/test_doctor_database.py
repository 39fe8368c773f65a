"""Every check of the database says OK on a healthy one, and speaks up for its own illness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, NullPool, create_engine, make_url, text

import outbox.schema
import saga.schema
from outbox.cli import main
from outbox.doctor import Finding, Level, database, examine_database, server, worst
from outbox.doctor.patient import Patient
from outbox.schema import Component
from tests.debian_postgres import DebianPostgres
from tests.servers import Room

COMPONENTS = (outbox.schema.component, saga.schema.component)


def examine(engine: Engine, schema: str = "outbox") -> dict[str, Finding]:
    return {each.check: each for each in examine_database(engine, COMPONENTS, schema)}


def found(engine: Engine, check: str) -> Finding:
    return examine(engine)[check]


@pytest.fixture
def healthy(migrated_database_url: str) -> Iterator[Engine]:
    """A migrated database whose new sessions have the settings that the doctor wants."""
    engine = create_engine(migrated_database_url, poolclass=NullPool)
    alter_database(engine, "idle_in_transaction_session_timeout = '60s'")
    yield engine
    engine.dispose()


def alter_database(engine: Engine, setting: str) -> None:
    run(engine, f"ALTER DATABASE {engine.url.database} SET {setting}")


def run(engine: Engine, sql: str, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(text(sql), values)


def test_a_healthy_database_passes_every_check(healthy: Engine) -> None:
    findings = examine(healthy)
    assert set(findings) == {"database reachable", *(name for name, _ in database.CHECKS)}
    ill = {each.check: each.found for each in findings.values() if each.level > Level.OK}
    assert ill.keys() <= {"encryption"}, "a test server in a container is behind a network"


@pytest.mark.parametrize(
    ("check", "illness", "level", "words"),
    [
        (
            "unlogged tables",
            "ALTER TABLE outbox.inbox_default SET UNLOGGED",
            Level.FAIL,
            "ALTER TABLE outbox.inbox_default SET LOGGED",
        ),
        (
            "default partition",
            "INSERT INTO outbox.outbox_event (position, lane, event_id, type, version, body) "
            "VALUES (99999999, 0, gen_random_uuid(), 't', 1, '')",
            Level.WARN,
            "outbox_event_default",
        ),
        (
            "system identifier",
            "INSERT INTO outbox.outbox_cluster (system_identifier) VALUES (42)",
            Level.FAIL,
            "cursors were stored in cluster 42",
        ),
        (
            "schema version",
            "DELETE FROM outbox.schema_version WHERE component = 'saga'",
            Level.FAIL,
            "outbox migrate --schema outbox",
        ),
    ],
)
def test_an_illness_of_the_tables_is_found(
    healthy: Engine, check: str, illness: str, level: Level, words: str
) -> None:
    run(healthy, illness)
    finding = found(healthy, check)
    assert finding.level is level
    assert words in finding.found + finding.fix
    assert finding.fix


@pytest.mark.parametrize(
    ("check", "setting", "level"),
    [
        ("synchronous_commit", "synchronous_commit = off", Level.WARN),
        ("writable", "default_transaction_read_only = on", Level.FAIL),
        ("isolation", "default_transaction_isolation = 'repeatable read'", Level.WARN),
        ("timeouts", "statement_timeout = '900ms'", Level.WARN),
        ("timeouts", "idle_in_transaction_session_timeout = 0", Level.WARN),
    ],
)
def test_a_setting_that_breaks_a_promise_is_found(
    healthy: Engine, check: str, setting: str, level: Level
) -> None:
    alter_database(healthy, setting)
    finding = found(healthy, check)
    assert finding.level is level
    assert finding.fix


def test_the_cluster_that_the_relay_adopted_is_recognised(healthy: Engine) -> None:
    run(
        healthy,
        "INSERT INTO outbox.outbox_cluster (system_identifier) "
        "SELECT system_identifier FROM pg_control_system()",
    )
    assert found(healthy, "system identifier").level is Level.OK


def test_a_long_transaction_is_named_with_its_process(
    healthy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LONG_TRANSACTION", timedelta(0))
    with healthy.connect() as slow, slow.begin():
        pid = slow.scalar(text("SELECT pg_backend_pid()"))
        finding = found(healthy, "long transactions")
    assert finding.level is Level.WARN
    assert f"pid {pid} " in finding.found
    assert "idle in transaction" in finding.found


def test_a_transaction_in_another_database_is_not_our_matter(
    healthy: Engine, make_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LONG_TRANSACTION", timedelta(0))
    elsewhere = create_engine(make_database(), poolclass=NullPool)
    with elsewhere.connect() as slow, slow.begin():
        slow.execute(text("SELECT 1"))
        assert found(healthy, "long transactions").level is Level.OK


def test_a_role_without_rights_is_told_which_are_missing(healthy: Engine, unique_name: str) -> None:
    run(healthy, f"CREATE ROLE {unique_name} LOGIN PASSWORD 'sesame'")
    run(healthy, f"GRANT USAGE ON SCHEMA outbox TO {unique_name}")
    run(healthy, f"GRANT SELECT ON ALL TABLES IN SCHEMA outbox TO {unique_name}")
    try:
        as_role = create_engine(
            healthy.url.set(username=unique_name, password="sesame"), poolclass=NullPool
        )
        finding = found(as_role, "rights")
        assert finding.level is Level.WARN
        assert "INSERT on outbox_event" in finding.found
        assert "SELECT on outbox_event" not in finding.found
    finally:
        run(healthy, f"DROP OWNED BY {unique_name}")
        run(healthy, f"DROP ROLE {unique_name}")


def test_an_empty_database_fails_what_needs_tables_and_checks_the_rest(engine: Engine) -> None:
    findings = examine(engine)
    assert findings["schema version"].level is Level.FAIL
    assert "outbox migrate" in findings["schema version"].fix
    assert findings["default partition"].level is Level.FAIL
    assert "could not be checked" in findings["default partition"].found
    assert findings["server version"].level is Level.OK
    assert findings["clock skew"].level is Level.OK


def test_tables_behind_the_release_are_a_warning(healthy: Engine) -> None:
    class Step:
        UP = ("SELECT 1",)
        DOWN = ("SELECT 1",)

    newer = Component("outbox", (*outbox.schema.component.versions, Step()))
    findings = {each.check: each for each in examine_database(healthy, [newer])}
    assert findings["schema version"].level is Level.WARN
    assert findings["schema version"].found == "outbox 2 of 3"


def test_a_database_that_does_not_answer_is_one_finding() -> None:
    engine = create_engine("postgresql+psycopg://me:sesame@127.0.0.1:1/x", poolclass=NullPool)
    (finding,) = examine_database(engine, COMPONENTS)
    assert (finding.check, finding.level) == ("database reachable", Level.FAIL)
    assert "sesame" not in finding.found


# ---- what needs a server of its own ----


@pytest.fixture
def careless(room: Room) -> Iterator[Engine]:
    """A migrated database on a server that may forget everything at a crash."""
    if DebianPostgres.programs() is None:
        pytest.skip("no server: Debian's postgresql is not installed")
    postgres = DebianPostgres(room.private_directory())
    postgres.settings |= {"full_page_writes": "off", "max_prepared_transactions": "2"}
    postgres.start()
    engine = create_engine(postgres.url, poolclass=NullPool)
    for component in COMPONENTS:
        component.upgrade_engine(engine)
    yield engine
    engine.dispose()
    postgres.discard()


def test_a_careless_server_and_a_forgotten_prepared_transaction_are_found(
    careless: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = examine(careless)
    assert findings["durability"].level is Level.FAIL
    assert "fsync and full_page_writes off" in findings["durability"].found
    assert findings["prepared transactions"].level is Level.OK
    with careless.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for sql in ("BEGIN", "CREATE TABLE t (id int)", "PREPARE TRANSACTION 'forgotten'"):
            connection.execute(text(sql))
    assert found(careless, "prepared transactions").level is Level.OK
    monkeypatch.setattr(server, "FORGOTTEN_PREPARED_TRANSACTION", timedelta(0))
    finding = found(careless, "prepared transactions")
    assert finding.level is Level.FAIL
    assert "ROLLBACK PREPARED" in finding.fix


# ---- what no server here can show ----


class Told(Patient):
    """Answers as told: for a pooler, a clock or a server that cannot be had here."""

    answers: Iterator[Any]

    def __init__(self, *answers: Any, backend_pid: int = 0) -> None:
        driver = type("Driver", (), {"info": type("Info", (), {"backend_pid": backend_pid})})
        connection = type("Pooled", (), {"driver_connection": driver})
        outer = type("Connection", (), {"connection": connection})
        object.__setattr__(self, "connection", outer)
        object.__setattr__(self, "answers", iter(answers))

    def one(self, sql: str, **values: Any) -> Any:
        answer = next(self.answers)
        return answer() if callable(answer) else answer

    def rows(self, sql: str, **values: Any) -> list[Any]:
        return [self.one(sql)]


def test_a_pooler_is_seen_by_the_process_that_answers() -> None:
    assert "no pooler" in server.pooler(Told(*[7] * 5, backend_pid=7))[1]
    assert "transaction mode" in server.pooler(Told(7, 8, 7, 9, 8, backend_pid=7))[1]


@pytest.mark.parametrize(
    ("skew", "level"), [(0, Level.OK), (5, Level.WARN), (-5, Level.WARN), (-120, Level.FAIL)]
)
def test_a_clock_that_differs_is_found_in_either_direction(skew: int, level: Level) -> None:
    def clock() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=skew)

    assert server.clock_skew(Told(clock, clock, clock))[0] is level


@pytest.mark.parametrize(
    ("encrypted", "local", "level"),
    [(True, False, Level.OK), (False, True, Level.OK), (False, False, Level.WARN)],
)
def test_a_connection_in_the_clear_over_a_network_is_found(
    encrypted: bool, local: bool, level: Level
) -> None:
    assert server.encryption(Told((encrypted, local)))[0] is level


@pytest.mark.parametrize(
    ("number", "level"), [("130020", Level.FAIL), ("140000", Level.OK), ("180004", Level.OK)]
)
def test_servers_before_14_are_refused(number: str, level: Level) -> None:
    assert server.server_version(Told(number, "x"))[0] is level


# ---- the command ----


def test_the_command_prints_each_check_with_its_fix_and_exits_1(
    healthy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.schema.installed.installed_components", lambda: COMPONENTS)
    run(healthy, "ALTER TABLE outbox.quarantine SET UNLOGGED")
    result = doctor(healthy)
    assert result.exit_code == 1
    assert "FAIL  unlogged tables" in result.stdout
    assert "ALTER TABLE outbox.quarantine SET LOGGED" in result.stdout
    assert "19 checks: " in result.stdout
    assert " 1 failed" in result.stdout


def test_warnings_exit_0_unless_strict(healthy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.schema.installed.installed_components", lambda: COMPONENTS)
    alter_database(healthy, "synchronous_commit = off")
    document = json.loads(doctor(healthy, "--json").stdout)
    assert document["verdict"] == "WARN"
    assert "synchronous_commit" in {
        each["check"] for each in document["findings"] if each["level"] == "WARN"
    }
    assert doctor(healthy).exit_code == 0
    assert doctor(healthy, "--strict").exit_code == 1


def test_the_command_needs_something_to_look_at() -> None:
    result = CliRunner(env={"OUTBOX_DATABASE_URL": None}).invoke(main, ["doctor"])
    assert result.exit_code == 2
    assert "--database-url" in result.output


def test_the_worst_of_nothing_is_ok() -> None:
    assert worst([]) is Level.OK


def doctor(engine: Engine, *arguments: str) -> Any:
    url = make_url(engine.url).render_as_string(hide_password=False)
    return CliRunner(env={"OUTBOX_DATABASE_URL": url}).invoke(main, ["doctor", *arguments])
