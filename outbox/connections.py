"""What a caller can hand to `publish`, and how rows are written through it in the transaction that it has open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final, NoReturn, Protocol

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from sqlalchemy import TextClause, text
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, scoped_session

from outbox.direct import write_directly
from outbox.errors import ConfigurationError, NotInTransaction

USE_ASYNC: Final = (
    "hand over a SQLAlchemy AsyncSession or AsyncConnection to `await apublish(...)`; with psycopg alone, use a "
    "synchronous connection"
)

Rows = list[tuple[Any, ...]]
Execute = Callable[[str, Sequence[Any], bool], Rows]
"""Runs SQL with `%s` placeholders and returns the rows, if it is to return any. `%b` is for arrays: binary where the
driver knows how, which for 100 bodies takes a fifth of the time of their text."""


class Executor(Protocol):
    """An `Execute` that runs in the transaction which a connection has open."""

    @property
    def driver(self) -> psycopg.Connection[Any] | None:
        """What statements reach the server through; None if it is not known to be psycopg."""

    def __call__(self, sql: str, params: Sequence[Any], returns: bool, /) -> Rows: ...


def executor(connection: object) -> Executor:
    """How to run SQL in the transaction that *connection* has open.

    Raises `NotInTransaction` for a connection in autocommit, `ConfigurationError` for something else than a
    SQLAlchemy `Session` or `Connection`, a psycopg connection or cursor, or Django's connection.
    """
    if isinstance(connection, psycopg.Connection):
        if connection.autocommit and connection.pgconn.transaction_status == TransactionStatus.IDLE:
            _refuse_autocommit()
        return _ThroughPsycopg(connection)
    if isinstance(connection, Connection):
        return _of_sqlalchemy(connection)
    if isinstance(connection, Session):
        return _of_sqlalchemy(connection.connection())
    if isinstance(connection, scoped_session):
        return executor(connection())
    if isinstance(connection, psycopg.Cursor):
        return executor(connection.connection)
    if hasattr(connection, "in_atomic_block") and hasattr(connection, "cursor"):
        return _of_django(connection)
    raise _refused(connection)


def _of_sqlalchemy(connection: Connection) -> Executor:
    driver = connection.connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        # SQLAlchemy begins lazily, and knows of its transaction only if it began it.
        if not connection.in_transaction() and not driver.autocommit:
            connection.begin()
        return executor(driver)
    if getattr(driver, "autocommit", False) or connection.get_isolation_level() == "AUTOCOMMIT":
        _refuse_autocommit()
    return _ThroughSQLAlchemy(connection)


def _of_django(connection: Any) -> Executor:
    if not connection.in_atomic_block:
        raise NotInTransaction(
            "Django's connection is not in an atomic block, so the event would be committed by itself: "
            "publish inside `with transaction.atomic():`"
        )
    return _ThroughDjango(connection)


@dataclass(slots=True)
class _ThroughPsycopg:
    driver: psycopg.Connection[Any]

    def __call__(self, sql: str, params: Sequence[Any], returns: bool, /) -> Rows:
        if not returns and write_directly(self.driver, sql, params):
            return []
        made = self.driver.cursor(row_factory=tuple_row)
        if isinstance(made, psycopg.RawCursor):  # which would not take `%s`
            made = psycopg.Cursor(self.driver, row_factory=tuple_row)
        with made as cursor:
            cursor.execute(sql.encode(), params)
            return cursor.fetchall() if returns else []


@dataclass(slots=True)
class _ThroughDjango:
    connection: Any
    driver: ClassVar[None] = None

    def __call__(self, sql: str, params: Sequence[Any], returns: bool, /) -> Rows:
        with self.connection.cursor() as cursor:
            cursor.execute(sql.replace("%b", "%s"), params)
            return [tuple(row) for row in cursor.fetchall()] if returns else []


@dataclass(slots=True)
class _ThroughSQLAlchemy:
    connection: Connection
    driver: ClassVar[None] = None

    def __call__(self, sql: str, params: Sequence[Any], returns: bool, /) -> Rows:
        named = {f"p{number}": param for number, param in enumerate(params)}
        result = self.connection.execute(_named(sql), named)
        return [tuple(row) for row in result] if returns else []


@lru_cache(maxsize=512)
def _named(sql: str) -> TextClause:
    first, *rest = sql.replace("%b", "%s").replace("::", "\\:\\:").split("%s")
    return text(first + "".join(f":p{number}{part}" for number, part in enumerate(rest)))


def _refuse_autocommit() -> NoReturn:
    raise NotInTransaction(
        "the connection is in autocommit, so the event would be committed by itself, apart from the data: "
        "publish inside a transaction (session.begin(), engine.begin(), or psycopg's connection.transaction())"
    )


def kind_of(connection: object) -> str:
    """Its class, for an error text."""
    return f"{type(connection).__module__}.{type(connection).__qualname__}"


def _refused(connection: object) -> ConfigurationError:
    kind = kind_of(connection)
    if isinstance(connection, psycopg.AsyncConnection | psycopg.AsyncCursor):
        return ConfigurationError(f"cannot publish through a {kind}: {USE_ASYNC}")
    if "async" in kind.lower():
        return ConfigurationError(f"{kind} is asynchronous: use `await apublish(...)`")
    return ConfigurationError(
        f"cannot publish through a {kind}: hand over a SQLAlchemy Session or Connection, a psycopg connection or "
        "cursor, or Django's connection"
    )
