"""The model as a DBAPI driver and a SQLAlchemy dialect, so that services run on it unchanged.

Every statement and every commit is announced to `on_step` first: there the scheduler may run somebody else, or end the
connection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import psycopg
from psycopg import errors
from sqlalchemy import create_engine
from sqlalchemy.dialects import registry as dialects
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from saga.testing.model.definitions import alter_nullability, define
from saga.testing.model.expressions import Environment
from saga.testing.model.functions import define_function
from saga.testing.model.parsing import parse
from saga.testing.model.statements import Result, execute
from saga.testing.model.storage import Storage, Transaction, Wait

_SAVEPOINT = re.compile(
    r"\s*(SAVEPOINT|RELEASE SAVEPOINT|ROLLBACK TO SAVEPOINT|ROLLBACK TO)\s+(\w+)", re.IGNORECASE
)
_SETTING = re.compile(
    r"\s*(SET|SHOW|GRANT|COMMENT|TRUNCATE|ALTER|DO|CREATE\s+(SCHEMA|SEQUENCE)|DROP\s+(SCHEMA|SEQUENCE))\b",
    re.IGNORECASE,
)
_NULLABLE = re.compile(
    r"\s*ALTER\s+TABLE\b.*\b(SET|DROP)\s+NOT\s+NULL\b", re.IGNORECASE | re.DOTALL
)
_FUNCTION = re.compile(r"\s*CREATE\s+(OR\s+REPLACE\s+)?FUNCTION\b", re.IGNORECASE)
_PARTITION = re.compile(r"\bPARTITION\s+OF\b", re.IGNORECASE)
_PARTITIONED = re.compile(
    r"\)\s*(PARTITION\s+BY\s+.*|WITH\s*\(.*\)\s*)$", re.IGNORECASE | re.DOTALL
)


def engine_on(connect: Callable[[], Connection]) -> Engine:
    """A SQLAlchemy engine whose connections *connect* makes; it keeps what it has compiled from one to the next."""
    return create_engine("postgresql+model://", creator=connect, poolclass=NullPool, module=_dbapi)


class ModelDatabase:
    """One service's database. `engine` runs SQLAlchemy on it; `on_step` and `wait` belong to the scheduler."""

    def __init__(
        self,
        name: str = "model",
        *,
        wait: Wait | None = None,
        on_step: Callable[[str], None] = lambda _: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.name = name
        self.on_step = on_step
        self.on_connect: Callable[[Connection], None] = lambda _: None
        self.storage = Storage(wait or _nobody_else, clock)

    def connect(self) -> Connection:
        connection = Connection(self)
        self.on_connect(connection)
        return connection

    def engine(self) -> Engine:
        """A SQLAlchemy engine on this database, without a pool: a connection is an object."""
        return engine_on(self.connect)

    def define(self, *statements: str) -> None:
        """Run statements of data definition, as a migration would."""
        with self.connect() as connection:
            for statement in statements:
                connection.cursor().execute(statement)
            connection.commit()


def _nobody_else(_waiter: Transaction, _blocked: Callable[[], bool]) -> None:
    raise errors.LockNotAvailable(
        "the statement would wait for another transaction, and no scheduler runs that one"
    )


class Connection:
    """A DBAPI connection; not in autocommit unless SQLAlchemy asks for it."""

    def __init__(self, database: ModelDatabase) -> None:
        self.database = database
        self.transaction: Transaction | None = None
        self.autocommit = False
        self.closed = False
        self.failed = False

    def cursor(self, *_: Any, **__: Any) -> Cursor:
        return Cursor(self)

    def begun(self) -> Transaction:
        if self.closed:
            raise psycopg.OperationalError("the connection is closed")
        if self.transaction is None:
            self.transaction = self.database.storage.begin()
        return self.transaction

    def commit(self) -> None:
        if self.transaction is None:
            return
        self.database.on_step("commit")
        if self.closed or self.transaction is None:
            raise psycopg.OperationalError("the connection was lost during commit")
        self._end(self.database.storage.rollback if self.failed else self.database.storage.commit)
        self.database.on_step("committed")
        if self.closed:
            raise psycopg.OperationalError("the connection was lost after commit was sent")

    def rollback(self) -> None:
        if self.transaction is not None:
            self._end(self.database.storage.rollback)

    def _end(self, how: Callable[[Transaction], None]) -> None:
        transaction, self.transaction, self.failed = self.transaction, None, False
        assert transaction is not None
        how(transaction)

    def close(self) -> None:
        self.rollback()
        self.closed = True

    def lose(self) -> None:
        """The connection breaks: the server rolls back, the client hears of it at its next call."""
        self.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Cursor:
    """A DBAPI cursor."""

    arraysize = 1

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._rows: Iterator[tuple[Any, ...]] = iter(())
        self.description: list[tuple[Any, ...]] | None = None
        self.rowcount = -1

    def execute(self, sql: str, params: Mapping[str, Any] | None = None, **_: Any) -> Cursor:
        connection = self.connection
        savepoint = _SAVEPOINT.match(sql)
        if savepoint is None:
            connection.database.on_step(sql)
        transaction = connection.begun()
        if savepoint is not None:
            self._savepoint(savepoint[1].upper(), savepoint[2], transaction)
            return self
        if connection.failed:
            raise errors.InFailedSqlTransaction(
                "current transaction is aborted, commands ignored until its end"
            )
        try:
            result = self._run(sql, params or {}, transaction)
        except psycopg.Error:
            if not transaction.ended:
                connection.failed = True
                connection.database.storage.fail(transaction)
            raise
        self._rows = iter(result.rows)
        self.rowcount = result.count
        self.description = [
            (name, None, None, None, None, None, None) for name in result.columns
        ] or None
        if connection.autocommit:
            connection.commit()
        return self

    def _run(self, sql: str, params: Mapping[str, Any], transaction: Transaction) -> Result:
        storage = self.connection.database.storage
        if _FUNCTION.match(sql):
            define_function(sql, storage)
        elif _NULLABLE.match(sql):
            alter_nullability(parse(sql), storage, transaction)
        elif _SETTING.match(sql) or _PARTITION.search(sql):
            pass
        elif sql.lstrip()[:6].upper() in {"CREATE", "DROP T"}:
            define(parse(_PARTITIONED.sub(")", sql)), storage)
        else:
            return execute(parse(sql), Environment(storage, transaction, params))
        return Result([], [], -1)

    def _savepoint(self, verb: str, name: str, transaction: Transaction) -> None:
        storage = self.connection.database.storage
        if verb == "SAVEPOINT":
            storage.savepoint(transaction, name)
        elif verb.startswith("RELEASE"):
            storage.release(transaction, name)
        else:
            storage.rollback_to(transaction, name)
            self.connection.failed = False

    def executemany(self, sql: str, many: list[Mapping[str, Any]]) -> None:
        for params in many:
            self.execute(sql, params)

    def fetchone(self) -> tuple[Any, ...] | None:
        return next(self._rows, None)

    def fetchall(self) -> list[tuple[Any, ...]]:
        return list(self._rows)

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        return [row for _, row in zip(range(size or self.arraysize), self._rows, strict=False)]

    def close(self) -> None:
        self._rows = iter(())


_dbapi = SimpleNamespace(
    paramstyle="pyformat", apilevel="2.0", threadsafety=0, Binary=bytes, connect=None,
    **{name: getattr(psycopg, name) for name in (
        "Error", "InterfaceError", "DatabaseError", "DataError", "OperationalError", "IntegrityError", "InternalError",
        "ProgrammingError", "NotSupportedError", "Warning")},
)  # fmt: skip


class ModelDialect(PGDialect):
    """PostgreSQL's dialect without a server: nothing is asked at connect."""

    driver = "model"
    default_paramstyle = "pyformat"
    supports_statement_cache = True
    supports_server_side_cursors = False
    use_insertmanyvalues = False
    insert_executemany_returning = False

    @classmethod
    def import_dbapi(cls) -> Any:
        return _dbapi

    def initialize(self, connection: Any) -> None:
        self.server_version_info = (18, 0)
        self.default_schema_name = "public"

    def _get_server_version_info(self, connection: Any) -> tuple[int, int]:
        return (18, 0)

    def has_table(
        self, connection: Any, table_name: str, schema: str | None = None, **_: Any
    ) -> bool:
        database = connection.connection.driver_connection.database
        return f"{schema or 'public'}.{table_name}" in database.storage.tables

    def has_multi_table(
        self, connection: Any, table_names: Sequence[str], schema: str | None = None, **_: Any
    ) -> list[tuple[tuple[str | None, str], bool]]:
        return [((schema, name), self.has_table(connection, name, schema)) for name in table_names]

    def do_ping(self, dbapi_connection: Any) -> bool:
        return not dbapi_connection.closed

    def is_disconnect(self, e: Exception, connection: Any, cursor: Any) -> bool:
        return isinstance(e, psycopg.OperationalError) and getattr(e, "sqlstate", None) is None

    def get_isolation_level(self, dbapi_connection: Any) -> Any:
        return "READ COMMITTED"

    def set_isolation_level(self, dbapi_connection: Any, level: str) -> None:
        dbapi_connection.autocommit = level == "AUTOCOMMIT"


dialects.register("postgresql.model", __name__, "ModelDialect")
