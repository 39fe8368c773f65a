"""`fetch` and `begin_with`: statements past the session must be what they are through it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import direct, statements
from outbox.statements import begin_with, fetch, statement
from outbox.transient import is_lock_timeout, is_transient
from tests.overtaking import overtake
from tests.workers import eventually


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


# ---- the first statements of a transaction ----

LIMIT = ("SELECT set_config('lock_timeout', :lock, true)", {"lock": "100ms"})
SAID = (
    """SELECT CAST(:id AS uuid) AS id, CAST(:body AS bytea) AS body, CAST(:missing AS text) AS missing,
    :number + 1 AS number, CAST(:flag AS boolean) AS flag, current_setting('lock_timeout') AS limit,
    '100% of {}' AS said, '1'::int AS cast_before, :number + 2 AS again""",
    {"id": uuid4(), "body": b"\x00\xff", "missing": None, "number": 3, "flag": False},
)
WRITE = ("INSERT INTO written (n) VALUES (:n) RETURNING n", {"n": 1})


def driver_of(session: Session) -> psycopg.Connection[Any]:
    driver = session.connection().connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver


@pytest.fixture
def written(session: Session) -> None:
    with session.begin():
        session.execute(text("CREATE TEMPORARY TABLE written (n int PRIMARY KEY)"))


def test_the_first_statements_are_one_transaction_with_what_follows(
    session: Session, written: None
) -> None:
    with session.begin():
        (row,) = begin_with(session, [LIMIT, SAID], "outbox")
        assert row == (SAID[1]["id"], b"\x00\xff", None, 4, False, "100ms", "100% of {}", 1, 5)
        assert driver_of(session).info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        session.execute(text("INSERT INTO written VALUES (1)"))
        session.rollback()
    assert not fetch(session, "SELECT n FROM written", {}, "outbox")
    assert fetch(session, "SHOW lock_timeout", {}, "outbox")[0].lock_timeout == "0"


def test_what_they_write_is_committed_with_the_rest(session: Session, written: None) -> None:
    for number in range(8):  # more often than it takes to be prepared
        with session.begin():
            assert begin_with(session, [LIMIT, (WRITE[0], {"n": number})], "outbox") == [(number,)]
    assert len(fetch(session, "SELECT n FROM written", {}, "outbox")) == 8
    query = "SELECT 1 FROM pg_prepared_statements WHERE statement LIKE 'INSERT INTO written%'"
    assert len(fetch(session, query, {}, "outbox")) == 1


def test_they_go_out_in_one_message(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[bool] = []
    real = direct.begin_directly

    def begin_directly(*given: Any) -> Any:
        began.append(True)
        return real(*given)

    monkeypatch.setattr(statements, "begin_directly", begin_directly)
    for _ in range(2):
        with session.begin():
            begin_with(session, [LIMIT, SAID], "outbox")
    assert len(began) == 2


@pytest.mark.parametrize(
    "hinder",
    [
        lambda session: session.execute(text("SELECT 1")),
        lambda session: session.connection(
            execution_options={"isolation_level": "REPEATABLE READ"}
        ),
        lambda session: driver_of(session).execute("SET client_encoding TO LATIN1"),
        lambda session: setattr(driver_of(session), "cursor_factory", partial(psycopg.Cursor)),
    ],
    ids=["a transaction that has begun", "an isolation level", "another encoding", "a partial"],
)
def test_where_that_cannot_be_they_run_one_by_one(
    session: Session, hinder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statements, "begin_directly", None)
    hinder(session)
    (row,) = begin_with(session, [LIMIT, SAID], "outbox")
    assert tuple(row) == (SAID[1]["id"], b"\x00\xff", None, 4, False, "100ms", "100% of {}", 1, 5)


def test_another_thread_that_begins_just_before_has_them_run_one_by_one(session: Session) -> None:
    driver, notices = driver_of(session), []
    driver.add_notice_handler(lambda said: notices.append(said.message_primary))
    overtake(driver, lambda: driver.execute("SELECT 1"))
    (row,) = begin_with(session, [LIMIT, SAID], "outbox")
    assert row[5] == "100ms"
    assert notices == []  # such as that there was a transaction in progress


@pytest.mark.parametrize("earlier_runs", [0, 4, 5, 6])
def test_the_first_that_fails_says_why_and_the_connection_lives_on(
    session: Session, written: None, earlier_runs: int
) -> None:
    """Before it is prepared, while it is, and after."""
    for number in range(earlier_runs):
        with session.begin():
            begin_with(session, [(WRITE[0], {"n": -number}), LIMIT], "outbox")
    with session.begin():
        begin_with(session, [WRITE], "outbox")
    with pytest.raises(DBAPIError) as failed, session.begin():
        begin_with(session, [WRITE, ("SELECT 1 / :n", {"n": 0})], "outbox")
    assert isinstance(failed.value.orig, psycopg.errors.UniqueViolation)
    assert str(failed.value.statement).startswith("INSERT INTO written")
    assert failed.value.params == {"n": 1}
    with session.begin():
        assert begin_with(session, [LIMIT, SAID], "outbox")
    assert len(fetch(session, "SELECT n FROM written", {}, "outbox")) == 1 + max(0, earlier_runs)


def test_a_lost_connection_is_one_to_be_made_anew(session: Session, engine: Engine) -> None:
    (pid,) = fetch(session, "SELECT pg_backend_pid() AS pid", {}, "outbox")[0]
    session.commit()
    with engine.connect() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
    with pytest.raises(DBAPIError) as lost:
        begin_with(session, [LIMIT, SAID], "outbox")
    assert is_transient(lost.value)
    assert driver_of(session).closed
    session.invalidate()


@pytest.fixture
def ctrl_c() -> Iterator[signal.Signals]:
    """A signal that does what SIGINT does where nobody ignores that."""
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


def test_what_ctrl_c_cancels_leaves_a_connection_that_lives_on(
    session: Session, engine: Engine, ctrl_c: signal.Signals
) -> None:
    driver, main = driver_of(session), threading.get_ident()
    asleep = text(
        "SELECT query ~ 'pg_sleep' AND wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = :pid"
    ).bindparams(pid=driver.info.backend_pid)

    def interrupt() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            eventually(lambda: other.scalar(asleep) is True)
        signal.pthread_kill(main, ctrl_c)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        begin_with(session, [LIMIT, ("SELECT pg_sleep(60)", {})], "outbox")
    thread.join()
    assert driver.info.pipeline_status == psycopg.pq.PipelineStatus.OFF
    assert driver.info.transaction_status == psycopg.pq.TransactionStatus.INERROR
    session.rollback()
    assert begin_with(session, [LIMIT, SAID], "outbox")


def test_an_interrupt_in_between_leaves_a_connection_that_says_it_is_busy(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = driver_of(session)

    def interrupted(*_: Any) -> Any:
        raise TimeoutError

    monkeypatch.setattr(driver, "wait", interrupted)
    with pytest.raises(TimeoutError):
        begin_with(session, [LIMIT, SAID], "outbox")
    assert driver.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE
    session.invalidate()
