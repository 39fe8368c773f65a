"""What a caller can hand to `publish`, and how rows are written through it in the transaction that it has open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, singledispatch
from typing import Any, NoReturn

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import TextClause, text
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, scoped_session

from outbox.direct import can_write_directly, write_directly
from outbox.errors import ConfigurationError, NotInTransaction

Rows = list[tuple[Any, ...]]
Execute = Callable[[str, Sequence[Any], bool], Rows]
"""Runs SQL with `%s` placeholders and returns the rows, if it is to return any."""


@singledispatch
def executor(connection: object) -> Execute:
    """How to run SQL in the transaction that *connection* has open.

    Raises `NotInTransaction` for a connection in autocommit, `ConfigurationError` for something else than a
    SQLAlchemy `Session` or `Connection`, a psycopg connection or cursor, or Django's connection.
    """
    if hasattr(connection, "in_atomic_block") and hasattr(connection, "cursor"):
        return _of_django(connection)
    raise _refused(connection)


@executor.register(Session)
def _(connection: Session) -> Execute:
    return executor(connection.connection())


@executor.register(scoped_session)
def _(connection: scoped_session[Any]) -> Execute:
    return executor(connection())


@executor.register(Connection)
def _(connection: Connection) -> Execute:
    driver = connection.connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        # SQLAlchemy begins lazily, and knows of its transaction only if it began it.
        if not connection.in_transaction() and not driver.autocommit:
            connection.begin()
        return executor(driver)
    if getattr(driver, "autocommit", False) or connection.get_isolation_level() == "AUTOCOMMIT":
        _refuse_autocommit()
    return _through_sqlalchemy(connection)


@executor.register(psycopg.Connection)
def _(connection: psycopg.Connection[Any]) -> Execute:
    if connection.autocommit and connection.pgconn.transaction_status == TransactionStatus.IDLE:
        _refuse_autocommit()

    def execute(sql: str, params: Sequence[Any], returns: bool) -> Rows:
        if (
            not returns
            and can_write_directly(connection)
            and write_directly(connection, sql, params)
        ):
            return []
        with connection.cursor(row_factory=psycopg.rows.tuple_row) as cursor:
            cursor.execute(sql.encode(), params)
            return cursor.fetchall() if returns else []

    return execute


@executor.register(psycopg.Cursor)
def _(connection: psycopg.Cursor[Any]) -> Execute:
    return executor(connection.connection)


def _of_django(connection: Any) -> Execute:
    if not connection.in_atomic_block:
        raise NotInTransaction(
            "Django's connection is not in an atomic block, so the event would be committed by itself: "
            "publish inside `with transaction.atomic():`"
        )

    def execute(sql: str, params: Sequence[Any], returns: bool) -> Rows:
        with connection.cursor() as cursor:
            cursor.execute(sql, params)
            return [tuple(row) for row in cursor.fetchall()] if returns else []

    return execute


def _through_sqlalchemy(connection: Connection) -> Execute:
    def execute(sql: str, params: Sequence[Any], returns: bool) -> Rows:
        named = {f"p{number}": param for number, param in enumerate(params)}
        result = connection.execute(_named(sql), named)
        return [tuple(row) for row in result] if returns else []

    return execute


@lru_cache(maxsize=512)
def _named(sql: str) -> TextClause:
    first, *rest = sql.replace("::", "\\:\\:").split("%s")
    return text(first + "".join(f":p{number}{part}" for number, part in enumerate(rest)))


def _refuse_autocommit() -> NoReturn:
    raise NotInTransaction(
        "the connection is in autocommit, so the event would be committed by itself, apart from the data: "
        "publish inside a transaction (session.begin(), engine.begin(), or psycopg's connection.transaction())"
    )


def _refused(connection: object) -> ConfigurationError:
    kind = f"{type(connection).__module__}.{type(connection).__qualname__}"
    if "async" in kind.lower():
        return ConfigurationError(f"{kind} is asynchronous: use `await apublish(...)`")
    return ConfigurationError(
        f"cannot publish through a {kind}: hand over a SQLAlchemy Session or Connection, a psycopg connection or "
        "cursor, or Django's connection"
    )
