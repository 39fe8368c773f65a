"""`outbox migrate`, run as a user runs it: from an installed wheel, in another directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, inspect, make_url, text

import outbox.schema
from tests.installed import Installed

Outbox = Callable[..., CompletedProcess[str]]


@pytest.fixture
def run_outbox(installed: Installed, database_url: str, tmp_path: Path) -> Outbox:
    """Runs the installed `outbox` in an empty directory, the database named by the environment."""

    def run(*arguments: str, **environment: str) -> CompletedProcess[str]:
        named = {"OUTBOX_DATABASE_URL": database_url, **environment}
        return installed.run("outbox", *arguments, cwd=tmp_path, environment=named)

    return run


def tables(url: str, schema: str = "outbox") -> set[str]:
    return set(inspect(create_engine(url, poolclass=NullPool)).get_table_names(schema=schema))


def versions(result: CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    return {each["component"]: each["version"] for each in json.loads(result.stdout)}


def test_it_makes_the_tables_of_every_installed_component(
    run_outbox: Outbox, database_url: str
) -> None:
    assert versions(run_outbox("migrate", "--json")) == {"outbox": 2, "saga": 1}
    assert {"outbox_event", "inbox", "saga", "saga_step"} <= tables(database_url)


def test_the_table_for_people_names_component_and_version(run_outbox: Outbox) -> None:
    result = run_outbox("migrate")
    assert result.returncode == 0
    for word in ("outbox", "saga", "newest"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout, "no colours into a pipe"


def test_a_second_run_does_nothing_and_says_so(run_outbox: Outbox) -> None:
    run_outbox("migrate")
    again = json.loads(run_outbox("migrate", "--json").stdout)
    assert [(each["before"], each["version"]) for each in again] == [(2, 2), (1, 1)]


def test_two_processes_at_once_both_succeed(run_outbox: Outbox) -> None:
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: run_outbox("migrate", "--json"), range(3)))
    assert [versions(each) for each in results] == [{"outbox": 2, "saga": 1}] * 3


def test_check_exits_1_until_there_is_nothing_to_do(run_outbox: Outbox, database_url: str) -> None:
    assert run_outbox("migrate", "--check").returncode == 1
    assert tables(database_url) == set()
    run_outbox("migrate")
    assert run_outbox("migrate", "--check").returncode == 0


def test_one_component_can_be_named(run_outbox: Outbox, database_url: str) -> None:
    assert versions(run_outbox("migrate", "--component", "outbox", "--to", "1", "--json")) == {
        "outbox": 1
    }
    assert "saga" not in tables(database_url)


def test_the_schema_comes_from_the_option_or_the_environment(
    run_outbox: Outbox, database_url: str
) -> None:
    run_outbox("migrate", "--schema", "orders")
    run_outbox("migrate", OUTBOX_SCHEMA="users")
    assert tables(database_url, "orders") == tables(database_url, "users") != set()
    assert tables(database_url) == set()


def test_the_url_may_stand_in_a_file(run_outbox: Outbox, database_url: str, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"{database_url}\n")
    result = run_outbox("migrate", "--database-url", "@url", OUTBOX_DATABASE_URL="")
    assert result.returncode == 0, result.stderr
    assert tables(database_url)


def test_a_url_without_a_driver_or_with_the_old_scheme_is_understood(
    run_outbox: Outbox, database_url: str
) -> None:
    for scheme in ("postgresql", "postgres"):
        plain = make_url(database_url).set(drivername="postgresql")
        url = plain.render_as_string(hide_password=False).replace("postgresql", scheme, 1)
        assert run_outbox("migrate", OUTBOX_DATABASE_URL=url).returncode == 0


def test_downgrade_asks_and_without_anybody_to_ask_does_nothing(
    run_outbox: Outbox, database_url: str
) -> None:
    run_outbox("migrate")
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        connection.execute(
            text("INSERT INTO outbox.outbox_key (source, type, key, seq) VALUES ('s', 't', 'k', 1)")
        )
    result = run_outbox("migrate", "--downgrade")
    assert result.returncode == 1
    assert "with the rows in outbox_key" in result.stderr
    assert "--yes" in result.stderr
    assert "outbox_event" in tables(database_url)


def test_downgrade_with_yes_drops_everything_of_ours_and_nothing_else(
    run_outbox: Outbox, database_url: str
) -> None:
    run_outbox("migrate")
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        connection.execute(text("CREATE TABLE outbox.theirs (id int)"))
    assert versions(run_outbox("migrate", "--downgrade", "--yes", "--json")) == {
        "outbox": 0,
        "saga": 0,
    }
    assert tables(database_url) == {"theirs"}
    assert versions(run_outbox("migrate", "--json")) == {"outbox": 2, "saga": 1}


def test_sql_is_printed_without_a_database_and_makes_the_same_tables(
    run_outbox: Outbox, database_url: str, make_database: Callable[[], str]
) -> None:
    script = run_outbox("migrate", "--sql", OUTBOX_DATABASE_URL="").stdout
    assert script.count("BEGIN;") == script.count("COMMIT;") == 2
    run_outbox("migrate")
    other = make_database()
    _run_script(other, script)
    assert tables(other) == tables(database_url)
    _run_script(other, run_outbox("migrate", "--downgrade", "--sql").stdout)
    assert tables(other) == set()


def test_sql_in_two_steps_is_told_where_it_starts(run_outbox: Outbox) -> None:
    script = run_outbox("migrate", "--sql", "--component", "saga", "--from", "1")
    assert script.returncode == 0, script.stderr
    assert "saga_step" not in script.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "1"], "add --component (outbox, saga)"),
        (["--component", "nothing"], "'nothing' is not installed"),
        (["--from", "1", "--component", "saga"], "--from goes with --sql"),
        (["--schema", 'a"; DROP TABLE x'], "cannot name a database schema"),
        (["--database-url", "@nowhere"], "cannot read 'nowhere'"),
        (["--to", "-1"], "-1"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_call_exits_2_and_says_why(
    run_outbox: Outbox, arguments: list[str], said: str
) -> None:
    result = run_outbox("migrate", *arguments)
    assert result.returncode == 2
    assert said in result.stderr


def test_no_database_named_is_a_wrong_call(run_outbox: Outbox) -> None:
    result = run_outbox("migrate", OUTBOX_DATABASE_URL="")
    assert result.returncode == 2
    assert "OUTBOX_DATABASE_URL" in result.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:sesame@127.0.0.1:1/x", "refused"),
        ("mysql://me:sesame@127.0.0.1/x", "needs PostgreSQL"),
        ("postgresql//me:sesame@127.0.0.1/x", "cannot be read"),
    ],
)
def test_a_database_that_is_not_there_exits_1_and_keeps_the_password(
    run_outbox: Outbox, url: str, said: str
) -> None:
    for result in (
        run_outbox("migrate", OUTBOX_DATABASE_URL=url),
        run_outbox("migrate", "--json", OUTBOX_DATABASE_URL=url),
    ):
        printed = result.stdout + result.stderr
        assert result.returncode == 1
        assert said in printed
        assert "sesame" not in printed
        assert "Traceback" not in printed
    assert said in json.loads(result.stdout)["error"]


def test_the_version_row_names_the_release(run_outbox: Outbox, database_url: str) -> None:
    run_outbox("migrate")
    released = run_outbox("--version").stdout.strip().rpartition(" ")[2]
    with create_engine(database_url, poolclass=NullPool).connect() as connection:
        assert outbox.schema.status(connection).package_version == released


def test_help_answers_without_importing_what_it_does_not_need(
    installed: Installed, tmp_path: Path
) -> None:
    program = (
        "import sys; from outbox.cli import main; main(['--help'], standalone_mode=False); "
        "heavy = {'sqlalchemy', 'celery', 'kombu', 'pydantic', 'alembic', 'rich'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    result = installed.run("python", "-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("migrate", "relay", "status", "doctor", "dead", "quarantine"):
        assert name in result.stdout


def _run_script(url: str, script: str) -> None:
    with create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as run:
        driver = run.connection.driver_connection
        assert driver is not None
        driver.execute(script)
