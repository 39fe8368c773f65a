"""Plays a script of statements by several sessions, on PostgreSQL or on the model, and writes down what each met.

A script line is `<session> <sql>`. The record says for each line whether it was done (with its rows), failed (with its
SQLSTATE) or had to wait, and when a waiting one went on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
from greenlet import greenlet
from sqlalchemy import make_url

from saga.testing.model import ModelDatabase
from saga.testing.model.driver import Connection
from saga.testing.model.storage import Transaction

Record = list[tuple[str, str, Any]]


def _outcome(connection: Any, sql: str) -> tuple[str, Any]:
    try:
        if sql in ("COMMIT", "ROLLBACK"):
            getattr(connection, sql.lower())()
            return "done", None
        cursor = connection.cursor()
        cursor.execute(sql)
        return "done", sorted(
            map(tuple, cursor.fetchall()), key=repr
        ) if cursor.description else cursor.rowcount
    except psycopg.Error as error:
        return "failed", error.sqlstate


class OnPostgreSQL:
    """Each session is a thread with a connection; who waits is read from the server."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._observer = psycopg.connect(conninfo, autocommit=True)
        self._sessions: dict[str, tuple[psycopg.Connection[Any], ThreadPoolExecutor]] = {}
        self._waiting: dict[str, Future[tuple[str, Any]]] = {}

    def play(self, setup: Sequence[str], script: Sequence[str]) -> Record:
        for statement in setup:
            self._observer.execute(statement.encode())
        record: Record = []
        for line in script:
            session, sql = line.split(" ", 1)
            connection, thread = self._session(session)
            self._waiting[session] = thread.submit(_outcome, connection, sql)
            self._settle()
            self._collect(record, session)
        self._close()
        return record

    def _session(self, name: str) -> tuple[psycopg.Connection[Any], ThreadPoolExecutor]:
        if name not in self._sessions:
            self._sessions[name] = (psycopg.connect(self._conninfo), ThreadPoolExecutor(1))
        return self._sessions[name]

    def _settle(self) -> None:
        pause = threading.Event()
        for _ in range(10_000):
            blocked = {name for name, future in self._waiting.items() if not future.done()}
            # Where all wait, one of them is about to be told of the deadlock.
            if all(map(self._is_blocked, blocked)) and (
                not blocked or blocked < self._sessions.keys()
            ):
                return
            pause.wait(0.001)
        raise TimeoutError(f"sessions neither finish nor wait: {sorted(self._waiting)}")

    def _is_blocked(self, name: str) -> bool:
        pid = self._sessions[name][0].info.backend_pid
        row = self._observer.execute("SELECT cardinality(pg_blocking_pids(%s))", (pid,)).fetchone()
        return row is not None and row[0] > 0

    def _collect(self, record: Record, spoken: str) -> None:
        for name in sorted(self._waiting, key=lambda name: (name != spoken, name)):
            if self._waiting[name].done():
                record.append((name, *self._waiting.pop(name).result()))
            elif name == spoken:
                record.append((name, "waits", None))

    def _close(self) -> None:
        for connection, thread in self._sessions.values():
            connection.cancel_safe() if self._waiting else None
            thread.shutdown()
            connection.close()
        self._observer.close()


class OnModel:
    """Each session is a greenlet; one that must wait goes back to the player."""

    def __init__(self) -> None:
        self._player = greenlet.getcurrent()
        self._database = ModelDatabase(wait=self._wait)
        self._sessions: dict[str, tuple[Connection, greenlet]] = {}
        self._waiting: dict[str, Callable[[], bool]] = {}
        self._results: dict[str, tuple[str, Any]] = {}

    def _wait(self, _waiter: Transaction, blocked: Callable[[], bool]) -> None:
        while blocked():
            name = next(
                name
                for name, (_, running) in self._sessions.items()
                if running is greenlet.getcurrent()
            )
            self._waiting[name] = blocked
            self._player.switch()

    def play(self, setup: Sequence[str], script: Sequence[str]) -> Record:
        for statement in setup:
            with self._database.connect() as connection:
                connection.cursor().execute(statement)
                connection.commit()
        record: Record = []
        for line in script:
            session, sql = line.split(" ", 1)
            self._run(session, sql)
            record.append((session, *self._results.pop(session, ("waits", None))))
            while ready := sorted(name for name, blocked in self._waiting.items() if not blocked()):
                del self._waiting[ready[0]]
                self._sessions[ready[0]][1].switch()
                if ready[0] in self._results:
                    record.append((ready[0], *self._results.pop(ready[0])))
        return record

    def _run(self, name: str, sql: str) -> None:
        connection = self._sessions[name][0] if name in self._sessions else self._database.connect()

        def statement() -> None:
            self._results[name] = _outcome(connection, sql)

        self._sessions[name] = (connection, greenlet(statement))
        self._sessions[name][1].switch()


def assert_alike(setup: Sequence[str], script: Sequence[str], database_url: str) -> None:
    """The model answers *script* as PostgreSQL does, both after *setup*."""
    conninfo = (
        make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    )
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            f"ALTER DATABASE {connection.info.dbname} SET deadlock_timeout = '50ms'".encode()
        )
    on_postgresql = OnPostgreSQL(conninfo).play(setup, script)
    assert OnModel().play(setup, script) == on_postgresql
