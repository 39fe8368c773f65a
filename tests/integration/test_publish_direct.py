"""Writing straight through libpq does what a cursor does, and leaves to a cursor what it could not do alike."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import Engine, make_url, text

from outbox import direct
from outbox.connections import executor
from outbox.direct import write_directly
from tests.overtaking import overtake

INSERT = "INSERT INTO kinds (id, label, number, body, big) VALUES (%s, %s, %s, %s, %s)"


@pytest.fixture
def connection(database_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(conninfo(database_url)) as opened:
        opened.execute(
            "CREATE TABLE kinds (id uuid PRIMARY KEY, label text, number smallint, body bytea, big bigint)"
        )
        opened.commit()
        yield opened
        if not opened.closed:
            opened.rollback()


def conninfo(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def rows(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute("SELECT id, label, number, body, big FROM kinds").fetchall()


def test_values_arrive_as_through_a_cursor(connection: psycopg.Connection) -> None:
    many = [
        (uuid4(), "", -1, b"", None),
        (uuid4(), "näme % \\ ' \U0001f600", 32_767, bytes(range(256)), 2**63 - 1),
        (uuid4(), None, None, None, -(2**63)),
    ]
    connection.execute("SELECT 1")
    for row in many:
        assert write_directly(connection, INSERT, row)
    assert rows(connection) == many


def test_a_text_that_would_end_at_a_nul_is_refused_as_by_a_cursor(
    connection: psycopg.Connection,
) -> None:
    connection.execute("SELECT 1")
    row = (uuid4(), "before\x00behind", 1, b"", 1)
    assert not write_directly(connection, INSERT, row)
    with pytest.raises(psycopg.DataError, match="NUL"):
        executor(connection)(INSERT, row, False)
    assert rows(connection) == []


def test_an_error_is_the_drivers_and_aborts_the_transaction(
    connection: psycopg.Connection,
) -> None:
    connection.execute("SELECT 1")
    row = (UUID(int=1), "a", 1, b"", 1)
    write_directly(connection, INSERT, row)
    with pytest.raises(psycopg.errors.UniqueViolation, match="kinds_pkey"):
        write_directly(connection, INSERT, row)
    assert not write_directly(connection, INSERT, row)
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        executor(connection)(INSERT, row, False)


def test_an_idle_connection_begins_its_transaction(connection: psycopg.Connection) -> None:
    assert not write_directly(connection, INSERT, (uuid4(), "a", 1, b"", 1))
    executor(connection)(INSERT, (uuid4(), "a", 1, b"", 1), False)
    connection.rollback()
    assert rows(connection) == []


@pytest.mark.parametrize("encoding", ["LATIN1", "UTF8"])
def test_text_arrives_whatever_the_clients_encoding_is(
    connection: psycopg.Connection, encoding: str
) -> None:
    connection.execute(f"SET client_encoding TO {encoding}")
    row = (uuid4(), "näme", 1, b"", 1)
    assert write_directly(connection, INSERT, row) is (encoding == "UTF8")
    executor(connection)(INSERT, (uuid4(), *row[1:]), False)
    assert {row[1] for row in rows(connection)} == {"näme"}


def test_a_commit_that_another_thread_makes_just_before_does_not_commit_what_follows(
    connection: psycopg.Connection,
) -> None:
    connection.execute("SELECT 1")
    overtake(connection, connection.commit)
    executor(connection)(INSERT, (uuid4(), "a", 1, b"", 1), False)
    connection.rollback()
    assert rows(connection) == []


@pytest.mark.parametrize(
    "kind",
    [
        psycopg.Cursor,
        psycopg.ClientCursor,
        psycopg.RawCursor,
        partial(psycopg.ClientCursor),
        partial(psycopg.RawCursor),
        lambda *args, **options: psycopg.Cursor(*args, **options),
    ],
    ids=["server", "client", "raw", "client by a partial", "raw by a partial", "by a lambda"],
)
def test_it_runs_whatever_kind_of_cursor_the_connection_makes(
    connection: psycopg.Connection, kind: Any
) -> None:
    connection.cursor_factory = kind
    connection.prepare_threshold = 0
    returned = executor(connection)(f"{INSERT} RETURNING number", (uuid4(), "a", 7, b"", 1), True)
    assert returned == [(7,)]
    executor(connection)(INSERT, (uuid4(), "a", 8, b"", 1), False)
    assert sorted(int(str(row[2])) for row in rows(connection)) == [7, 8]
    on_client = isinstance(connection.cursor(), psycopg.ClientCursor)
    assert bool(prepared(connection)) is not on_client


def test_rows_come_through_the_cursor_that_the_connection_hands_out(database_url: str) -> None:
    handed_out: list[psycopg.Cursor[Any]] = []

    class Traced(psycopg.Connection[Any]):
        def cursor(self, *args: Any, **options: Any) -> Any:
            handed_out.append(super().cursor(*args, **options))
            return handed_out[-1]

    with Traced.connect(conninfo(database_url)) as connection:
        assert executor(connection)("SELECT %s::int", (7,), True) == [(7,)]
    assert len(handed_out) == 1


def test_in_pipeline_mode_the_order_of_statements_is_kept(connection: psycopg.Connection) -> None:
    with connection.pipeline():
        connection.execute("SELECT 1")
        executor(connection)(INSERT, (uuid4(), "a", 1, b"", 1), False)
        connection.execute("DELETE FROM kinds")
    assert rows(connection) == []


def prepared(connection: psycopg.Connection) -> list[str]:
    """The inserts that the server has prepared for *connection*."""
    found = connection.execute(
        "SELECT statement FROM pg_prepared_statements WHERE statement LIKE 'INSERT%'"
    )
    return [statement for (statement,) in found]


def write(connection: psycopg.Connection, times: int) -> None:
    connection.execute("SELECT 1")
    for _ in range(times):
        assert write_directly(connection, INSERT, (uuid4(), "a", 1, b"", 1))


def test_a_statement_is_prepared_when_a_cursor_would_have_prepared_it(
    connection: psycopg.Connection,
) -> None:
    connection.prepare_threshold = 2
    write(connection, 2)
    assert prepared(connection) == []
    write(connection, 3)
    assert len(prepared(connection)) == 1
    assert len(rows(connection)) == 5


def test_nothing_is_prepared_where_the_connection_prepares_nothing(
    connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.prepare_threshold = None
    write(connection, 3)
    assert prepared(connection) == []
    connection.prepare_threshold = 0
    monkeypatch.setattr(direct, "_ACCOUNT", "another name")
    write(connection, 3)
    assert prepared(connection) == []
    assert len(rows(connection)) == 6


def test_what_was_prepared_and_thrown_away_is_prepared_anew(connection: psycopg.Connection) -> None:
    connection.prepare_threshold = 0
    for throw_away in (
        connection.rollback,
        lambda: connection.execute("DEALLOCATE ALL"),
        lambda: connection.execute("ALTER TABLE kinds ADD COLUMN more text"),
        lambda: _discard_all(connection),
    ):
        write(connection, 2)
        assert len(prepared(connection)) == 1
        throw_away()
        write(connection, 2)
        assert len(prepared(connection)) == 1


def _discard_all(connection: psycopg.Connection) -> None:
    connection.commit()
    connection.autocommit = True
    connection.execute("DISCARD ALL")
    connection.autocommit = False


def test_no_more_is_kept_prepared_than_the_connection_may_keep(
    connection: psycopg.Connection,
) -> None:
    connection.prepare_threshold, connection.prepared_max = 0, 1
    connection.execute("SELECT 1")
    for _ in range(2):
        for columns in ("id", "label, id"):
            sql = f"INSERT INTO kinds ({columns}) VALUES ({'%s, ' * columns.count(',')}%s)"
            assert write_directly(connection, sql, ("a", uuid4())[-1 - columns.count(",") :])
    connection.prepare_threshold = None
    assert len(prepared(connection)) == 1


def test_an_error_of_a_prepared_statement_leaves_it_prepared_and_the_connection_usable(
    connection: psycopg.Connection,
) -> None:
    connection.prepare_threshold = 0
    row = (UUID(int=1), "a", 1, b"", 1)
    connection.execute("SELECT 1")
    write_directly(connection, INSERT, row)
    with pytest.raises(psycopg.errors.UniqueViolation), connection.transaction():
        write_directly(connection, INSERT, row)
    write(connection, 2)
    assert len(rows(connection)) == 3


def test_a_statement_that_cannot_be_prepared_raises_and_is_not_taken_for_prepared(
    connection: psycopg.Connection,
) -> None:
    connection.prepare_threshold = 0
    sql = "INSERT INTO nowhere (id) VALUES (%s)"
    for _ in range(2):
        connection.execute("SELECT 1")
        with pytest.raises(psycopg.errors.UndefinedTable):
            write_directly(connection, sql, (1,))
        connection.rollback()
    connection.execute("CREATE TABLE nowhere (id integer)")
    assert write_directly(connection, sql, (1,))


def test_a_lost_connection_is_an_operational_error(
    connection: psycopg.Connection, engine: Engine
) -> None:
    (pid,) = connection.execute("SELECT pg_backend_pid()").fetchone() or (0,)
    with engine.connect() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
    with pytest.raises(psycopg.OperationalError):
        write_directly(connection, INSERT, (uuid4(), "a", 1, b"", 1))
    assert connection.closed
