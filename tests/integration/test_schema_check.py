"""What roles may do, what `status` and `check` say, and the functions without a database."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, NullPool, create_engine, text

import outbox.schema
import saga.schema
from outbox.errors import ConfigurationError, SchemaError
from outbox.schema import Component
from outbox.schema.component import operations
from tests.schemas import COMPONENTS, Steps, catalogue, migrate

# ---- rights ----


def test_a_role_that_may_not_create_schemas_can_migrate_into_one_made_for_it(
    engine: Engine, unique_name: str
) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {unique_name}"))
        connection.execute(text(f"CREATE SCHEMA outbox AUTHORIZATION {unique_name}"))
    try:
        with _as_role(engine, unique_name) as connection, connection.begin():
            outbox.schema.upgrade(operations(connection))
            assert outbox.schema.status(connection).version == outbox.schema.component.latest
    finally:
        _drop_role(engine, unique_name)


def test_a_role_without_rights_is_told_which(engine: Engine, unique_name: str) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {unique_name}"))
    try:
        with (
            _as_role(engine, unique_name) as connection,
            pytest.raises(SchemaError, match="GRANT USAGE ON SCHEMA outbox"),
        ):
            outbox.schema.check(connection)
    finally:
        _drop_role(engine, unique_name)


# ---- status and check ----


def test_check_says_what_to_run_where_there_are_no_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        with pytest.raises(SchemaError, match="outbox migrate --schema orders"):
            outbox.schema.check(connection, "orders")
        outbox.schema.upgrade(operations(connection), schema="orders")
        outbox.schema.check(connection, "orders")
        with pytest.raises(SchemaError, match=r"saga\.schema\.upgrade\(op\)"):
            saga.schema.check(connection, "orders")


def test_check_accepts_older_tables_only_as_far_as_the_code_can_run_on_them(
    engine: Engine,
) -> None:
    steps = [Steps(f"CREATE TABLE {{schema}}.t{n} (id int)") for n in range(3)]
    Component("c", steps[:2]).upgrade_engine(engine)
    with engine.connect() as connection:
        Component("c", steps, oldest_usable=2).check(connection)
        Component("c", steps[:1]).check(connection)
        with pytest.raises(SchemaError, match="at version 2, and this release needs 3"):
            Component("c", steps, oldest_usable=3).check(connection)


def test_code_older_than_the_tables_refuses_to_migrate(engine: Engine) -> None:
    steps = [Steps(f"CREATE TABLE {{schema}}.t{n} (id int)") for n in range(2)]
    Component("c", steps).upgrade_engine(engine)
    with pytest.raises(SchemaError, match="made by a newer release"):
        Component("c", steps[:1]).downgrade_engine(engine)


def test_status_tells_who_applied_the_newest_step_and_when(engine: Engine) -> None:
    outbox.schema.upgrade_engine(engine)
    with engine.connect() as connection:
        status = outbox.schema.status(connection)
        assert status.package_version
        assert status.applied_at == connection.scalar(
            text("SELECT max(applied_at) FROM outbox.schema_version")
        )


# ---- offline ----


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda each: each.name)
def test_offline_sql_makes_the_same_tables(
    component: Component, make_database: Callable[[], str]
) -> None:
    online = create_engine(make_database(), poolclass=NullPool)
    component.upgrade_engine(online)
    offline = create_engine(make_database(), poolclass=NullPool)
    _run_script(offline, _sql(lambda op: component.upgrade(op, from_=0)))
    assert catalogue(offline, "outbox") == catalogue(online, "outbox")
    with offline.connect() as connection:
        assert component.status(connection).version == component.latest
    _run_script(offline, _sql(lambda op: component.downgrade(op, from_=component.latest)))
    assert catalogue(offline, "outbox") == []


def test_offline_sql_needs_to_be_told_where_it_starts() -> None:
    with pytest.raises(ConfigurationError, match="from_="):
        _sql(lambda op: outbox.schema.upgrade(op))


def test_a_version_that_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(ConfigurationError, match="this release knows 0 to 2"):
        outbox.schema.upgrade_engine(engine, to=3)


def test_the_schema_functions_do_not_import_alembic_until_they_run() -> None:
    program = "import sys, outbox.schema, saga.schema; sys.exit('alembic' in sys.modules)"
    root = Path(outbox.schema.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def _sql(run: Callable[[Operations], None]) -> str:
    printed = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql",
        opts={"as_sql": True, "literal_binds": True, "output_buffer": printed},
        dialect_opts={"paramstyle": "named"},
    )
    run(Operations(context))
    return printed.getvalue()


def _run_script(engine: Engine, script: str) -> None:
    with engine.begin() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute(script)


def _as_role(engine: Engine, role: str) -> Connection:
    connection = engine.connect()
    connection.execute(text(f"SET ROLE {role}"))
    connection.commit()
    return connection


def _drop_role(engine: Engine, role: str) -> None:
    engine.dispose()
    with engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {role} CASCADE"))
        connection.execute(text(f"DROP ROLE {role}"))
