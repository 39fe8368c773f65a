"""A component's tables as numbered steps, run through Alembic's operations from wherever.

The same functions serve a revision of the user's own (online, and offline with `--sql`), this
repository's `migrations/`, `outbox migrate`, and tests. Every step and its row in `schema_version`
are one transaction, under one advisory lock per schema: two processes that migrate at once do the
work once, and a failure leaves nothing half done.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, Protocol

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from outbox.errors import ConfigurationError, SchemaError
from outbox.sql import DEFAULT_SCHEMA, in_schema

if TYPE_CHECKING:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import Engine, Executable

_DISTRIBUTION: Final = "outbox-saga"
_CREATED_TABLE: Final = re.compile(r"CREATE TABLE \{schema\}\.(\w+)")
_INSUFFICIENT_PRIVILEGE: Final = "42501"
_LOCK_NOT_AVAILABLE: Final = "55P03"

# The advisory lock is waited for without a limit of ours: whoever holds it is doing this very work.
# After it, a table lock that cannot be had soon is given up, because everyone who comes later would
# queue up behind us. The caller's own timeout is put back at the end; it travels in a setting, as
# offline SQL has no variables.
_ENTER: Final = (
    "SELECT pg_advisory_xact_lock(hashtextextended('outbox schema {schema}', 0))",
    "SELECT set_config('outbox.callers_lock_timeout', current_setting('lock_timeout'), true)",
    "SET LOCAL lock_timeout = '2s'",
)
_LEAVE: Final = (
    "SELECT set_config('lock_timeout', current_setting('outbox.callers_lock_timeout'), true)",
)
# CREATE SCHEMA IF NOT EXISTS asks for the right to create schemas even where there is nothing to
# create.
_BOOKKEEPING: Final = (
    """
    DO $$ BEGIN
        IF to_regnamespace('{schema}') IS NULL THEN
            CREATE SCHEMA {schema};
        END IF;
        IF to_regclass('{schema}.schema_version') IS NULL THEN
            CREATE TABLE {schema}.schema_version (
                component       text        NOT NULL,
                version         integer     NOT NULL,
                package_version text        NOT NULL,
                applied_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
                PRIMARY KEY (component, version)
            );
        END IF;
    END $$
    """,
)
_DROP_EMPTY_BOOKKEEPING: Final = """
    DO $$ BEGIN
        IF NOT EXISTS (SELECT FROM {schema}.schema_version) THEN
            DROP TABLE {schema}.schema_version;
        END IF;
    END $$
    """
_RECORD: Final = (
    "INSERT INTO {schema}.schema_version (component, version, package_version) "
    "VALUES (:component, :version, :package_version)"
)
_FORGET: Final = (
    "DELETE FROM {schema}.schema_version WHERE component = :component AND version = :version"
)
_NEWEST: Final = (
    "SELECT version, package_version, applied_at FROM {schema}.schema_version "
    "WHERE component = :component ORDER BY version DESC LIMIT 1"
)


class Steps(Protocol):
    """A `vNNN.py` module: statements with `{schema}` in place of the schema's name."""

    @property
    def UP(self) -> Sequence[str]: ...  # noqa: N802
    @property
    def DOWN(self) -> Sequence[str]: ...  # noqa: N802


class Op(Protocol):
    """What is needed of Alembic's `op`: the proxy in a revision, or an `Operations` object."""

    def execute(self, sqltext: Executable | str, /) -> None: ...
    def get_context(self) -> MigrationContext: ...


@dataclass(frozen=True, slots=True)
class Status:
    """How far one component's tables are in one database."""

    component: str
    schema: str
    version: int
    """Newest step applied; 0 before the first."""
    latest: int
    """Newest step that this release has."""
    package_version: str | None = None
    """The release that applied it."""
    applied_at: datetime | None = None

    @property
    def behind(self) -> bool:
        """Whether `outbox migrate` has something to do."""
        return self.version < self.latest


class Component:
    """The tables of one package, versioned on a line of their own in a schema shared by all.

    *versions* are the steps in order, the first being version 1. *oldest_usable* is the lowest
    version that this release's code can run on, so that code and tables can be deployed one after
    the other.
    """

    def __init__(self, name: str, versions: Sequence[Steps], *, oldest_usable: int = 1) -> None:
        self.name = name
        self.versions = tuple(versions)
        self.oldest_usable = oldest_usable

    def __repr__(self) -> str:
        return f"Component({self.name!r}, latest={self.latest})"

    @property
    def latest(self) -> int:
        """The newest version that this release has."""
        return len(self.versions)

    @property
    def table_names(self) -> frozenset[str]:
        """Every table that any of its steps creates, without the schema."""
        return frozenset(
            name
            for step in self.versions
            for statement in step.UP
            for name in _CREATED_TABLE.findall(statement)
        )

    def upgrade(
        self,
        op: Op,
        to: int | None = None,
        from_: int | None = None,
        schema: str = DEFAULT_SCHEMA,
    ) -> None:
        """Bring the tables up to version *to* (None: the newest). Does nothing when they are there.

        Call it from a revision with Alembic's own `op`. *from_* is needed in offline mode
        (`--sql`), where the database cannot be asked; online, what is recorded in the database
        decides. Runs inside the caller's transaction. Raises `ConfigurationError` for a version
        that does not exist, in autocommit, or offline without *from_*.
        """
        target = self._checked(self.latest if to is None else to)
        self._run(op, _ENTER, schema)
        self._require_transaction(op)
        self._run(op, _BOOKKEEPING, schema)
        for number in range(self._start(op, from_, schema) + 1, target + 1):
            self._run(op, self.versions[number - 1].UP, schema)
            self._mark(op, _RECORD, schema, number, package_version=_package_version())
        self._run(op, _LEAVE, schema)

    def downgrade(
        self,
        op: Op,
        to: int = 0,
        from_: int | None = None,
        schema: str = DEFAULT_SCHEMA,
    ) -> None:
        """Take the tables back to version *to*; 0 drops them with everything in them.

        The schema itself stays: it may be the caller's, with rights granted on it.
        """
        target = self._checked(to)
        self._run(op, _ENTER, schema)
        self._require_transaction(op)
        self._run(op, _BOOKKEEPING, schema)
        for number in range(self._start(op, from_, schema), target, -1):
            self._run(op, self.versions[number - 1].DOWN, schema)
            self._mark(op, _FORGET, schema, number)
        self._run(op, (_DROP_EMPTY_BOOKKEEPING, *_LEAVE), schema)

    def upgrade_engine(
        self, engine: Engine, schema: str = DEFAULT_SCHEMA, to: int | None = None
    ) -> None:
        """`upgrade` in its own transaction, tried again when a table lock cannot be had at once."""
        for attempt in _while_tables_are_locked():
            with attempt, _read_committed(engine) as connection, connection.begin():
                self.upgrade(operations(connection), to=to, schema=schema)

    def downgrade_engine(self, engine: Engine, schema: str = DEFAULT_SCHEMA, to: int = 0) -> None:
        """`downgrade` in its own transaction, tried again when a lock cannot be had at once."""
        for attempt in _while_tables_are_locked():
            with attempt, _read_committed(engine) as connection, connection.begin():
                self.downgrade(operations(connection), to=to, schema=schema)

    def status(self, connection: Connection, schema: str = DEFAULT_SCHEMA) -> Status:
        """Read how far the tables are. Raises `SchemaError` where the role may not even look."""
        try:
            there = connection.scalar(
                text(in_schema("SELECT to_regclass('{schema}.schema_version') IS NOT NULL", schema))
            )
            row = (
                connection.execute(
                    text(in_schema(_NEWEST, schema)), {"component": self.name}
                ).one_or_none()
                if there
                else None
            )
        except ProgrammingError as error:
            if _sqlstate(error) != _INSUFFICIENT_PRIVILEGE:
                raise
            raise SchemaError(
                f"this database role may not read {schema}.schema_version: "
                f"GRANT USAGE ON SCHEMA {schema} and rights on the tables in it"
            ) from error
        if row is None:
            return Status(self.name, schema, 0, self.latest)
        return Status(
            self.name, schema, row.version, self.latest, row.package_version, row.applied_at
        )

    def check(self, connection: Connection, schema: str = DEFAULT_SCHEMA) -> None:
        """Raise `SchemaError`, saying what to do, unless this release can run on these tables.

        Tables newer than the code are accepted: in a rolling deploy they come first, and only add.
        """
        status = self.status(connection, schema)
        if status.version == 0:
            raise SchemaError(
                f"schema {schema!r} has no tables of {self.name!r}: "
                f"run `outbox migrate --schema {schema}`, "
                f"or call {self.name}.schema.upgrade(op) from an Alembic revision"
            )
        if status.version < self.oldest_usable:
            raise SchemaError(
                f"the tables of {self.name!r} in schema {schema!r} are at version "
                f"{status.version}, and this release needs {self.oldest_usable} or newer: "
                f"run `outbox migrate --schema {schema}`"
            )

    def _checked(self, target: int) -> int:
        if not 0 <= target <= self.latest:
            raise ConfigurationError(
                f"{self.name!r} has no version {target}: this release knows 0 to {self.latest}"
            )
        return target

    def _start(self, op: Op, from_: int | None, schema: str) -> int:
        context = op.get_context()
        if context.as_sql:
            if from_ is None:
                raise ConfigurationError(
                    "offline SQL cannot ask the database where it is: "
                    f"pass from_= to {self.name}.schema.upgrade and downgrade"
                )
            return self._checked(from_)
        connection = context.connection
        assert connection is not None
        current = self.status(connection, schema).version
        if current > self.latest:
            raise SchemaError(
                f"the tables of {self.name!r} are at version {current}, made by a newer release; "
                f"this one knows {self.latest} at most"
            )
        return current

    def _require_transaction(self, op: Op) -> None:
        connection = op.get_context().connection
        if op.get_context().as_sql or connection is None:
            return
        began = text("SELECT transaction_timestamp()")
        if connection.scalar(began) != connection.scalar(began):
            raise ConfigurationError(
                "the connection is in autocommit, so a failure could leave half of the tables: "
                "call this inside a transaction, and not inside autocommit_block()"
            )

    def _run(self, op: Op, statements: Sequence[str], schema: str) -> None:
        for statement in statements:
            op.execute(text(in_schema(statement, schema)))

    def _mark(self, op: Op, statement: str, schema: str, number: int, **values: str) -> None:
        marked = text(in_schema(statement, schema))
        op.execute(marked.bindparams(component=self.name, version=number, **values))


def operations(connection: Connection) -> Operations:
    """Alembic's operations on *connection*, outside any Alembic environment."""
    # Not at the top: Alembic, while it is imported, loads our plug-in, and relays do not need it.
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    return Operations(MigrationContext.configure(connection))


def _read_committed(engine: Engine) -> Connection:
    return engine.connect().execution_options(isolation_level="READ COMMITTED")


def _while_tables_are_locked() -> Retrying:
    return Retrying(
        retry=retry_if_exception(lambda error: _sqlstate(error) == _LOCK_NOT_AVAILABLE),
        stop=stop_after_attempt(8),
        wait=wait_random_exponential(multiplier=0.25, max=5),
        reraise=True,
    )


def _sqlstate(error: BaseException) -> str | None:
    if isinstance(error, OperationalError | ProgrammingError):
        return getattr(error.orig, "sqlstate", None)
    return None


def _package_version() -> str:
    try:
        return version(_DISTRIBUTION)
    except PackageNotFoundError:
        return "not installed"
