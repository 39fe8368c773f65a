"""The versioned functions: they make what the models say, on every PostgreSQL, and only once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

import outbox.schema
from outbox.errors import ConfigurationError
from outbox.schema import Component
from outbox.schema.component import operations
from tests.debian_postgres import DebianPostgres
from tests.local_servers import LocalPostgres, await_condition
from tests.schemas import Steps, catalogue, make_models, migrate, remove
from tests.servers import Room


@pytest.fixture(scope="session", params=["PostgreSQL 18", "Debian's PostgreSQL"])
def server(request: pytest.FixtureRequest, room: Room) -> Iterator[LocalPostgres]:
    if request.param == "PostgreSQL 18":
        server = LocalPostgres(room.private_directory())
    elif DebianPostgres.programs() is not None:
        server = DebianPostgres(room.private_directory())
    else:
        pytest.skip("no server: Debian's postgresql is not installed")
    server.start()
    yield server
    server.discard()


@pytest.fixture
def empty(server: LocalPostgres, unique_name: str) -> Iterator[Engine]:
    """An engine on an empty database, on PostgreSQL 18 and on an older one."""
    administration = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with administration.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {unique_name}"))
    engine = create_engine(make_url(server.url).set(database=unique_name))
    yield engine
    engine.dispose()


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
        assert outbox.schema.status(connection, "users").version == outbox.schema.component.latest
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
    assert [row[:2] for row in _versions(engine)] == [("outbox", 1), ("outbox", 2), ("saga", 1)]


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
        assert outbox.schema.status(connection).version == outbox.schema.component.latest
        connection.rollback()
        assert outbox.schema.status(connection).version == 0


def test_autocommit_is_refused_before_anything_is_made(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with pytest.raises(ConfigurationError, match="autocommit"):
            outbox.schema.upgrade(operations(connection))
        assert connection.scalar(text("SELECT to_regnamespace('outbox')")) is None


def _versions(engine: Engine) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT * FROM outbox.schema_version ORDER BY component, version")
        )
        return [tuple(row) for row in rows]


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
