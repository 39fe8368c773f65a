"""The versioned functions: they make what the models say, on every PostgreSQL, and only once."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

import outbox.schema
import outbox.tables
import saga.schema
import saga.tables
from outbox.errors import ConfigurationError, SchemaError
from outbox.schema import Component
from outbox.schema.component import operations
from tests.debian_postgres import DebianPostgres
from tests.local_servers import await_condition
from tests.servers import Room

COMPONENTS = (outbox.schema.component, saga.schema.component)

# Everything that makes a table what it is, by name and free of the schema's name. Partitions are
# left out: the models do not list them.
CATALOGUE = """
WITH ours AS (
    SELECT oid, relname, relkind, relpersistence, reloptions
    FROM pg_class
    WHERE relnamespace = to_regnamespace(:schema) AND NOT relispartition AND relkind IN ('r', 'p')
)
SELECT relname || ' ' || relkind::text || relpersistence::text || ' '
    || coalesce(reloptions::text, '') || ' ' || coalesce(pg_get_partkeydef(oid), '') FROM ours
UNION ALL
SELECT format('%s column %s: %s %s %s %s %s', relname,
    row_number() OVER (PARTITION BY attrelid ORDER BY attnum), attname,
    format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'NOT NULL' END,
    attidentity, pg_get_expr(adbin, adrelid))
FROM ours JOIN pg_attribute ON attrelid = ours.oid AND attnum > 0 AND NOT attisdropped
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
UNION ALL
SELECT format('%s %s', relname, pg_get_indexdef(indexrelid)) FROM ours JOIN pg_index ON indrelid = oid
UNION ALL
SELECT format('%s %s %s', relname, conname, pg_get_constraintdef(c.oid))
FROM ours JOIN pg_constraint AS c ON conrelid = ours.oid
ORDER BY 1
"""


@pytest.fixture(scope="session")
def debian_postgres(room: Room) -> Iterator[DebianPostgres]:
    server = DebianPostgres(room.private_directory()).start()
    yield server
    server.discard()


@pytest.fixture(params=["the session's PostgreSQL", "Debian's PostgreSQL"])
def empty(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine on an empty database, on the session's server and on an older one."""
    if request.param == "the session's PostgreSQL":
        yield request.getfixturevalue("engine")
        return
    if DebianPostgres.programs() is None:
        pytest.skip("no server: Debian's postgresql is not installed")
    server: DebianPostgres = request.getfixturevalue("debian_postgres")
    name = f"t{abs(hash(request.node.nodeid))}"
    administration = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with administration.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine = create_engine(make_url(server.url).set(database=name))
    yield engine
    engine.dispose()


def catalogue(engine: Engine, schema: str) -> list[str]:
    with engine.connect() as connection:
        lines = connection.scalars(text(CATALOGUE), {"schema": schema})
        return [line.replace(f"{schema}.", "") for line in lines]


def migrate(engine: Engine, schema: str = "outbox") -> None:
    for component in COMPONENTS:
        component.upgrade_engine(engine, schema=schema)


def remove(engine: Engine, schema: str = "outbox") -> None:
    for component in reversed(COMPONENTS):
        component.downgrade_engine(engine, schema=schema)


def make_models(engine: Engine, schema: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
        connection.execute(text(f"CREATE SEQUENCE {schema}.outbox_event_position"))
        saga.tables.make_tables(schema, outbox.tables.make_tables(schema)).create_all(connection)


# ---- what the steps make ----


def test_the_steps_make_exactly_what_the_models_say(empty: Engine) -> None:
    migrate(empty)
    make_models(empty, "model")
    made = catalogue(empty, "outbox")
    assert len(made) > 100
    assert made == catalogue(empty, "model")


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE outbox.inbox ALTER digest DROP NOT NULL",
        "ALTER TABLE outbox.outbox_event ALTER xid DROP DEFAULT",
        "ALTER TABLE outbox.dead_letter ALTER attempts TYPE bigint",
        "DROP INDEX outbox.outbox_event_xid",
        "ALTER TABLE outbox.saga DROP CONSTRAINT saga_state_check",
        "ALTER TABLE outbox.quarantine SET UNLOGGED",
    ],
)
def test_the_comparison_sees_every_kind_of_difference(engine: Engine, change: str) -> None:
    migrate(engine)
    before = catalogue(engine, "outbox")
    with engine.begin() as connection:
        connection.execute(text(change))
    assert catalogue(engine, "outbox") != before


def test_a_transaction_has_its_xid_before_its_first_position(empty: Engine) -> None:
    migrate(empty)
    columns = catalogue(empty, "outbox")
    assert "outbox_event column 1: xid xid8 NOT NULL  pg_current_xact_id()" in columns
    assert any(
        line.startswith("outbox_event column 2: position bigint") and "nextval" in line
        for line in columns
    )


def test_going_back_leaves_nothing_and_going_forth_again_makes_the_same(empty: Engine) -> None:
    migrate(empty)
    first = catalogue(empty, "outbox")
    remove(empty)
    with empty.connect() as connection:
        left = connection.scalar(
            text("SELECT count(*) FROM pg_class WHERE relnamespace = 'outbox'::regnamespace")
        )
    assert left == 0
    migrate(empty)
    assert catalogue(empty, "outbox") == first


def test_two_schemas_of_one_database_know_nothing_of_each_other(engine: Engine) -> None:
    migrate(engine, "orders")
    migrate(engine, "users")
    remove(engine, "orders")
    assert catalogue(engine, "users")
    with engine.connect() as connection:
        assert outbox.schema.status(connection, "orders").version == 0
        assert outbox.schema.status(connection, "users").version == 1
        connection.execute(
            text(
                "INSERT INTO users.outbox_event (lane, event_id, type, version, body) "
                "VALUES (0, gen_random_uuid(), 't', 1, '')"
            )
        )


# ---- again, at once, half-way ----


def test_a_second_run_changes_nothing(engine: Engine) -> None:
    migrate(engine)
    before = _versions(engine)
    migrate(engine)
    assert _versions(engine) == before


def test_processes_that_migrate_at_once_do_the_work_once(database_url: str) -> None:
    def one(_: int) -> None:
        engine = create_engine(database_url, poolclass=NullPool)
        migrate(engine)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    engine = create_engine(database_url, poolclass=NullPool)
    assert [row[:2] for row in _versions(engine)] == [("outbox", 1), ("saga", 1)]


def test_a_step_that_fails_half_way_leaves_nothing(engine: Engine) -> None:
    broken = Component("broken", (Steps("CREATE TABLE {schema}.half (id int)", "SELECT 1/0"),))
    with pytest.raises(DBAPIError, match="division by zero"):
        broken.upgrade_engine(engine)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT to_regnamespace('outbox')")) is None
    mended = Component("broken", (Steps("CREATE TABLE {schema}.half (id int)"),))
    mended.upgrade_engine(engine)
    with engine.connect() as connection:
        assert mended.status(connection).version == 1


def test_a_new_step_is_applied_to_what_is_there(engine: Engine) -> None:
    first = Steps("CREATE TABLE {schema}.grown (id int)")
    second = Steps("ALTER TABLE {schema}.grown ADD name text")
    Component("grown", (first,)).upgrade_engine(engine)
    newer = Component("grown", (first, second))
    with engine.connect() as connection:
        assert newer.status(connection).behind
    newer.upgrade_engine(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO outbox.grown (id, name) VALUES (1, 'x')"))
        assert not newer.status(connection).behind


def test_a_table_that_is_in_use_is_waited_for_briefly_and_then_tried_again(engine: Engine) -> None:
    first = Steps("CREATE TABLE {schema}.busy (id int)")
    Component("busy", (first,)).upgrade_engine(engine)
    newer = Component("busy", (first, Steps("ALTER TABLE {schema}.busy ADD name text")))
    with ThreadPoolExecutor(1) as pool:
        with engine.connect() as holder, holder.begin():
            holder.execute(text("SELECT * FROM outbox.busy"))
            upgrade = pool.submit(newer.upgrade_engine, engine)
            _await_second_try(engine)
        upgrade.result(timeout=30)
    with engine.connect() as connection:
        assert newer.status(connection).version == 2


def test_the_callers_lock_timeout_comes_back(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '17s'"))
        outbox.schema.upgrade(operations(connection))
        assert connection.scalar(text("SHOW lock_timeout")) == "17s"


def test_a_rollback_of_the_callers_transaction_takes_the_tables_with_it(engine: Engine) -> None:
    with engine.connect() as connection:
        outbox.schema.upgrade(operations(connection))
        assert outbox.schema.status(connection).version == 1
        connection.rollback()
        assert outbox.schema.status(connection).version == 0


def test_autocommit_is_refused_before_anything_is_made(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with pytest.raises(ConfigurationError, match="autocommit"):
            outbox.schema.upgrade(operations(connection))
        assert connection.scalar(text("SELECT to_regnamespace('outbox')")) is None


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
            assert outbox.schema.status(connection).version == 1
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
            text("SELECT applied_at FROM outbox.schema_version")
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
    with pytest.raises(ConfigurationError, match="this release knows 0 to 1"):
        outbox.schema.upgrade_engine(engine, to=2)


def test_the_schema_functions_do_not_import_alembic_until_they_run() -> None:
    program = "import sys, outbox.schema, saga.schema; sys.exit('alembic' in sys.modules)"
    root = Path(outbox.schema.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


# ---- helpers ----


class Steps:
    """A version as a `vNNN.py` module has it."""

    def __init__(self, *up: str) -> None:
        self.UP = up
        self.DOWN = ("SELECT 1",)


def _versions(engine: Engine) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM outbox.schema_version ORDER BY component"))
        return [tuple(row) for row in rows]


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


def _await_second_try(engine: Engine) -> None:
    began = text(
        "SELECT xact_start FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND datname = current_database()"
    )
    tries: set[object] = set()

    def is_waiting_again() -> bool:
        with engine.connect() as connection:
            tries.update(connection.scalars(began))
        return len(tries) >= 2

    await_condition(is_waiting_again, within=30, what="a second try")
