"""Events exist exactly if the transaction that published them committed, through every kind of connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import outbox
from outbox.envelope import decode
from outbox.events import Registry

registry = Registry()

INSTEAD = r"cannot publish through a psycopg\.Async.*: hand over a SQLAlchemy AsyncSession or AsyncConnection"


@registry.event("thing.made", key="number")
@dataclass
class Made:
    number: int
    note: str = ""


@registry.event("thing.counted", key="number", ordered=True)
@dataclass
class Counted:
    number: int


def publish(connection: Any, *events: object) -> None:
    outbox.publish_all(connection, events or [Made(1)], registry=registry)


def stored(engine: Engine, columns: str = "body") -> list[Any]:
    with engine.connect() as connection:
        rows = connection.execute(
            text(f"SELECT {columns} FROM outbox.outbox_event ORDER BY position")
        )
        return [tuple(row) if len(row) > 1 else row[0] for row in rows]


def numbers(engine: Engine) -> list[int]:
    return [decode(bytes(body)).data["number"] for body in stored(engine)]


@contextmanager
def _session(engine: Engine) -> Iterator[Any]:
    with Session(engine) as session:
        yield session


@contextmanager
def _scoped(engine: Engine) -> Iterator[Any]:
    session = scoped_session(sessionmaker(engine))
    yield session
    session.remove()


@contextmanager
def _connection(engine: Engine) -> Iterator[Any]:
    with engine.connect() as connection:
        yield connection


@contextmanager
def _psycopg(engine: Engine) -> Iterator[Any]:
    with psycopg.connect(conninfo(engine)) as connection:
        yield connection


@contextmanager
def _cursor(engine: Engine) -> Iterator[Any]:
    class Cursor(psycopg.Cursor[Any]):
        def commit(self) -> None:
            self.connection.commit()

        def rollback(self) -> None:
            self.connection.rollback()

    with psycopg.connect(conninfo(engine), cursor_factory=Cursor) as connection:
        yield connection.cursor()


def conninfo(engine: Engine) -> str:
    return make_url(engine.url).set(drivername="postgresql").render_as_string(hide_password=False)


KINDS = pytest.mark.parametrize(
    "opened",
    [_session, _scoped, _connection, _psycopg, _cursor],
    ids=["session", "scoped", "connection", "psycopg", "cursor"],
)


@KINDS
def test_a_committed_transaction_publishes_its_events_in_order(
    migrated_engine: Engine, opened: Callable[..., Any]
) -> None:
    with opened(migrated_engine) as connection:
        publish(connection, Made(1))
        publish(connection, Made(2), Made(3))
        connection.commit()
    assert numbers(migrated_engine) == [1, 2, 3]


@KINDS
def test_a_rollback_publishes_nothing(migrated_engine: Engine, opened: Callable[..., Any]) -> None:
    with opened(migrated_engine) as connection:
        publish(connection)
        connection.rollback()
    assert stored(migrated_engine) == []


@KINDS
def test_a_connection_that_is_closed_without_commit_publishes_nothing(
    migrated_engine: Engine, opened: Any
) -> None:
    def fail() -> None:
        with opened(migrated_engine) as connection:
            publish(connection)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert stored(migrated_engine) == []


def test_a_session_can_be_used_again_after_a_rollback(migrated_engine: Engine) -> None:
    with Session(migrated_engine) as session:
        publish(session, Made(1))
        session.rollback()
        publish(session, Made(2))
        session.commit()
        publish(session, Made(3))
        session.commit()
    assert numbers(migrated_engine) == [2, 3]


def test_a_savepoint_takes_its_events_with_it(migrated_engine: Engine) -> None:
    with Session(migrated_engine) as session, session.begin():
        publish(session, Made(1))
        savepoint = session.begin_nested()
        publish(session, Made(2))
        savepoint.rollback()
        with session.begin_nested():
            publish(session, Made(3))
        publish(session, Made(4))
    assert sorted(numbers(migrated_engine)) == [1, 3, 4]


def test_events_held_by_the_root_survive_a_savepoint_rolled_back_around_a_released_one(
    migrated_engine: Engine,
) -> None:
    with Session(migrated_engine) as session, session.begin():
        publish(session, Made(1))
        outer = session.begin_nested()
        with session.begin_nested():
            publish(session, Made(2))
        outer.rollback()
    assert numbers(migrated_engine) == [1]


def test_a_savepoint_that_the_session_does_not_know_of_takes_its_events_with_it(
    migrated_engine: Engine,
) -> None:
    with Session(migrated_engine) as session, session.begin():
        publish(session, Made(1))
        savepoint = session.connection().begin_nested()
        publish(session, Made(2))
        savepoint.rollback()
    assert numbers(migrated_engine) == [1]


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_events_around_a_savepoint_keep_their_order(migrated_engine: Engine, ends: str) -> None:
    with Session(migrated_engine) as session, session.begin():
        session.connection()
        publish(session, Made(1))
        savepoint = session.begin_nested()
        publish(session, Made(2))
        getattr(savepoint, ends)()
        publish(session, Made(3))
        with session.begin_nested(), session.begin_nested():
            publish(session, Made(4))
        publish(session, Made(5))
    assert numbers(migrated_engine) == [1, *([2] if ends == "commit" else []), 3, 4, 5]


def test_a_session_joined_to_an_outer_transaction_publishes_with_that_one(
    migrated_engine: Engine,
) -> None:
    with migrated_engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            publish(session, Made(1))
            session.commit()
        outer.rollback()
    assert stored(migrated_engine) == []


def test_the_session_writes_its_rows_before_the_event_draws_its_position(
    migrated_engine: Engine,
) -> None:
    """Two writers of one row: whoever commits first has the lower position, though the other published first."""
    with migrated_engine.begin() as connection:
        connection.execute(text("CREATE TABLE account (id integer PRIMARY KEY, version integer)"))
        connection.execute(text("INSERT INTO account VALUES (1, 0)"))
    first = Session(migrated_engine)
    publish(first, Made(1, "published first, writes second"))
    with Session(migrated_engine) as second, second.begin():
        second.execute(text("UPDATE account SET version = 1"))
        publish(second, Made(2))
    first.execute(text("UPDATE account SET version = 2"))
    first.commit()
    first.close()
    assert numbers(migrated_engine) == [2, 1]


def test_what_another_listener_publishes_at_the_commit_is_written_too(
    migrated_engine: Engine,
) -> None:
    with Session(migrated_engine) as session:
        publish(session, Made(1))
        event.listen(session, "before_commit", lambda session: publish(session, Made(2)))
        session.commit()
    assert numbers(migrated_engine) == [1, 2]


def test_refused_events_write_nothing_and_leave_the_transaction_usable(
    migrated_engine: Engine,
) -> None:
    class Unregistered: ...

    with Session(migrated_engine) as session, session.begin():
        with pytest.raises(outbox.UnregisteredEvent, match="is no event type"):
            publish(session, Made(1), Unregistered())
        with pytest.raises(outbox.InvalidPayload, match=r"note holds a NUL"):
            publish(session, Made(2, "a\x00b"))
        with pytest.raises(outbox.PayloadTooLarge, match="claim check"):
            publish(session, Made(3, "x" * 2_000_000))
        with pytest.raises(outbox.InvalidPayload):
            publish(session, Made("not a number"))  # type: ignore[arg-type]
        publish(session, Made(4))
    assert numbers(migrated_engine) == [4]


def test_autocommit_is_refused(migrated_engine: Engine) -> None:
    autocommit = migrated_engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection, pytest.raises(outbox.NotInTransaction):
        publish(connection)
    with Session(autocommit) as session, pytest.raises(outbox.NotInTransaction):
        publish(session)
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as raw:
        with pytest.raises(outbox.NotInTransaction):
            publish(raw)
        with raw.transaction():
            publish(raw)
    assert numbers(migrated_engine) == [1]


def test_something_that_is_no_connection_is_refused_by_name() -> None:
    with pytest.raises(outbox.ConfigurationError, match=r"cannot publish through a builtins\.str"):
        publish("postgresql://somewhere")


def test_asynchronous_sessions_and_connections_publish_with_their_transaction(
    migrated_engine: Engine,
) -> None:
    async def scenario() -> None:
        engine = create_async_engine(migrated_engine.url)
        async with AsyncSession(engine) as session:
            await outbox.apublish(session, Made(1), registry=registry)
            await session.commit()
            await outbox.apublish(session, Made(2), registry=registry)
            await session.rollback()
        async with engine.begin() as connection:
            await outbox.apublish_all(connection, [Made(3), Made(4)], registry=registry)
        async with AsyncSession(engine) as session:
            with pytest.raises(outbox.ConfigurationError, match="await apublish"):
                publish(session)
        await engine.dispose()

    asyncio.run(scenario())
    assert numbers(migrated_engine) == [1, 3, 4]


def test_psycopgs_asynchronous_connection_is_refused_with_what_to_use_instead(
    migrated_engine: Engine,
) -> None:
    async def scenario() -> None:
        async with await psycopg.AsyncConnection.connect(conninfo(migrated_engine)) as connection:
            for refused in (connection, connection.cursor()):
                with pytest.raises(outbox.ConfigurationError, match=INSTEAD):
                    await outbox.apublish(refused, Made(1), registry=registry)  # type: ignore[arg-type]
                with pytest.raises(outbox.ConfigurationError, match=INSTEAD):
                    publish(refused)

    asyncio.run(scenario())


def test_ordered_events_are_numbered_without_gaps(migrated_engine: Engine) -> None:
    with Session(migrated_engine) as session:
        publish(session, Counted(7), Counted(8), Counted(7))
        session.commit()
        publish(session, Counted(7))
        session.rollback()
        publish(session, Counted(7))
        session.commit()
    assert stored(migrated_engine, "key, key_seq") == [("7", 1), ("8", 1), ("7", 2), ("7", 3)]


def test_writers_of_the_same_ordered_keys_in_opposite_order_do_not_deadlock(
    migrated_engine: Engine,
) -> None:
    errors: list[BaseException] = []

    def write(*keys: int) -> None:
        try:
            for _ in range(30):
                with Session(migrated_engine) as session, session.begin():
                    publish(session, *map(Counted, keys))
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=write, args=keys) for keys in ((1, 2, 3), (3, 2, 1), (2, 1, 3))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    by_key: dict[str, list[int]] = {}
    for key, key_seq in stored(migrated_engine, "key, key_seq"):
        by_key.setdefault(key, []).append(key_seq)
    assert by_key == {key: list(range(1, 91)) for key in "123"}


def test_events_of_one_key_share_a_lane(migrated_engine: Engine) -> None:
    with Session(migrated_engine) as session, session.begin():
        publish(session, *(Made(number % 3) for number in range(30)))
    assert len(set(stored(migrated_engine, "key, lane"))) == 3


def test_importing_the_packages_connects_to_nothing_and_loads_no_celery() -> None:
    import subprocess
    import sys

    code = (
        "import sys, socket, os; os.environ.clear()\n"
        "socket.socket.connect = lambda *a: sys.exit('connected')\n"
        "import outbox, saga, outbox.publishing\n"
        "assert callable(outbox.publish) and callable(outbox.event)\n"
        "assert 'celery' not in sys.modules, 'celery'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
