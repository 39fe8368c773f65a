"""This repository's own Alembic environment, which holds the models to the tables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from sqlalchemy import NullPool, create_engine, inspect, text

from tests.installed import ROOT

Alembic = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def alembic(database_url: str) -> Alembic:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=ROOT,
            env={**os.environ, "OUTBOX_DATABASE_URL": database_url},
            text=True,
            capture_output=True,
            check=False,
            timeout=60,
        )

    return run


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tables(url: str, schema: str = "outbox") -> set[str]:
    return set(inspect(create_engine(url, poolclass=NullPool)).get_table_names(schema=schema))


def test_nothing_differs_from_the_models(alembic: Alembic) -> None:
    succeeded(alembic("upgrade", "head"))
    assert "No new upgrade operations" in succeeded(alembic("check"))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("ALTER TABLE outbox.outbox_event ALTER COLUMN type TYPE varchar", "modify_type"),
        ("ALTER TABLE outbox.inbox DROP COLUMN digest", "add_column"),
        ("ALTER TABLE outbox.dead_letter ALTER COLUMN error DROP NOT NULL", "modify_nullable"),
        ("DROP INDEX outbox.pending_delivery_due", "add_index"),
        ("ALTER TABLE outbox.saga ADD COLUMN extra text", "remove_column"),
        ("CREATE TABLE outbox.stray (id int)", "remove_table"),
        ("DROP TABLE outbox.saga_join_arrival", "add_table"),
    ],
)
def test_a_difference_from_the_models_is_seen(
    alembic: Alembic, database_url: str, change: str, seen: str
) -> None:
    succeeded(alembic("upgrade", "head"))
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        connection.execute(text(change))
    result = alembic("check")
    assert result.returncode != 0
    assert seen in result.stdout + result.stderr


def test_up_down_and_up_again(alembic: Alembic, database_url: str) -> None:
    succeeded(alembic("upgrade", "head"))
    made = tables(database_url)
    succeeded(alembic("downgrade", "base"))
    assert tables(database_url) == {"alembic_version"}
    succeeded(alembic("upgrade", "head"))
    assert tables(database_url) == made


def test_one_component_can_be_had_without_the_other(alembic: Alembic, database_url: str) -> None:
    succeeded(alembic("upgrade", "0001"))
    assert "outbox_event" in tables(database_url)
    assert "saga" not in tables(database_url)


def test_the_schema_is_a_matter_of_choice(alembic: Alembic, database_url: str) -> None:
    succeeded(alembic("-x", "schema=elsewhere", "upgrade", "head"))
    assert "No new upgrade operations" in succeeded(alembic("-x", "schema=elsewhere", "check"))
    assert "alembic_version" in tables(database_url, "elsewhere")
    assert tables(database_url, "public") == tables(database_url) == set()


def test_offline_sql_makes_the_same_tables(
    alembic: Alembic, database_url: str, make_database: Callable[[], str]
) -> None:
    other = make_database()
    script = succeeded(alembic("upgrade", "head", "--sql"))
    with create_engine(other, poolclass=NullPool).begin() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute(script.replace("BEGIN;", "").replace("COMMIT;", ""))
    succeeded(alembic("upgrade", "head"))
    assert tables(other) == tables(database_url)


def test_every_step_of_a_component_has_a_revision_here(alembic: Alembic) -> None:
    import outbox.schema
    import saga.schema

    history = succeeded(alembic("history")).lower()
    for component in (outbox.schema.component, saga.schema.component):
        for number in range(1, component.latest + 1):
            assert f"`{component.name}`, version {number}" in history
