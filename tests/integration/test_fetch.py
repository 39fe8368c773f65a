"""`fetch`: a statement on the driver's own cursor must be what it is through the session."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox.statements import fetch, statement
from outbox.transient import is_lock_timeout


@pytest.fixture
def session(database_url: str) -> Iterator[Session]:
    engine: Engine = create_engine(database_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


def test_rows_are_those_of_the_session(session: Session) -> None:
    template = """
    SELECT CAST(:id AS uuid) AS id, CAST(:body AS bytea) AS body, CAST(:wait AS interval) AS wait,
        CAST(:missing AS text) AS missing, '100% of {}' AS said, '1'::int AS cast_before
    """
    values = {"id": uuid4(), "body": b"\x00\xff", "wait": timedelta(seconds=3), "missing": None}
    (row,) = fetch(session, template, values, "outbox")
    (other,) = session.execute(statement(template.replace("::int", "\\:\\:int"), "outbox"), values)
    assert tuple(row) == tuple(other)
    assert row.body == b"\x00\xff"


def test_a_statement_without_rows_gives_none(session: Session) -> None:
    assert not fetch(session, "CREATE TEMPORARY TABLE fetched (n int)", {}, "outbox")
    assert not fetch(session, "INSERT INTO fetched (n) VALUES (:n)", {"n": 1}, "outbox")
    assert fetch(session, "DELETE FROM fetched RETURNING n", {}, "outbox")[0].n == 1


def test_it_is_part_of_the_transaction_of_the_session(session: Session) -> None:
    with session.begin():
        session.execute(text("CREATE TEMPORARY TABLE kept (n int)"))
    with session.begin():
        fetch(session, "INSERT INTO kept (n) VALUES (1)", {}, "outbox")
        session.rollback()
    assert not fetch(session, "SELECT n FROM kept", {}, "outbox")


def test_errors_are_those_of_the_session(session: Session) -> None:
    with pytest.raises(DBAPIError) as direct:
        fetch(session, "SELECT 1 / :n", {"n": 0}, "outbox")
    session.rollback()
    with pytest.raises(DBAPIError) as through:
        session.execute(text("SELECT 1 / :n"), {"n": 0})
    assert type(direct.value) is type(through.value)
    assert not is_lock_timeout(direct.value)
