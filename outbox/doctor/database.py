"""Is this PostgreSQL one that keeps the promises, and are our tables in it as they must be?"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from outbox.doctor.finding import Answer, Check, Finding, Level, fail, ok, run, warn
from outbox.errors import SchemaError
from outbox.sql import DEFAULT_SCHEMA, in_schema

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from outbox.schema import Component

OLDEST_SERVER: Final = 140_000
LONG_TRANSACTION: Final = timedelta(minutes=5)
FORGOTTEN_PREPARED_TRANSACTION: Final = timedelta(minutes=10)
SKEW_WORTH_KNOWING: Final = timedelta(seconds=2)
SKEW_THAT_BREAKS: Final = timedelta(minutes=1)


@dataclass(frozen=True)
class Patient:
    """A connection in autocommit, so that no check holds a snapshot, and where to look."""

    connection: Connection
    schema: str
    components: tuple[Component, ...]

    def one(self, sql: str, **values: Any) -> Any:
        """The first column of the first row."""
        return self.connection.scalar(text(in_schema(sql, self.schema)), values)

    def rows(self, sql: str, **values: Any) -> list[Any]:
        """All rows."""
        return list(self.connection.execute(text(in_schema(sql, self.schema)), values))

    def setting(self, name: str) -> str:
        """A setting as it stands for this role and database."""
        return str(self.one("SELECT current_setting(:name)", name=name))


def examine_database(
    engine: Engine, components: Iterable[Component], schema: str = DEFAULT_SCHEMA
) -> Iterator[Finding]:
    """Make all checks on the database behind *engine*. One finding only where it does not answer."""
    began = datetime.now(UTC)
    try:
        with _autocommit(engine) as connection:
            took = datetime.now(UTC) - began
            yield Finding(
                "database reachable", Level.OK, f"in {took.total_seconds() * 1000:.0f} ms"
            )
            yield from run(CHECKS, Patient(connection, schema, tuple(components)))
    except OSError as error:
        yield _unreachable(error)
    except Exception as error:
        if getattr(error, "orig", None) is None:
            raise
        yield _unreachable(error)


@contextmanager
def _autocommit(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


def _unreachable(error: Exception) -> Finding:
    reason = str(getattr(error, "orig", error)).strip()
    return Finding("database reachable", Level.FAIL, reason, "check the URL, the network, the role")


def server_version(patient: Patient) -> Answer:
    version = int(patient.setting("server_version_num"))
    name = f"PostgreSQL {patient.setting('server_version')}"
    if version < OLDEST_SERVER:
        return fail(name, "move to PostgreSQL 14 or newer: xid8 and pg_snapshot are needed")
    return ok(name)


def writable(patient: Patient) -> Answer:
    if patient.one("SELECT pg_is_in_recovery()"):
        return fail("this is a standby", "point the URL at the primary")
    if patient.setting("default_transaction_read_only") == "on":
        return fail(
            "default_transaction_read_only is on", "turn it off for this role, or use the primary"
        )
    return ok("primary, read and write")


def encoding(patient: Patient) -> Answer:
    name = patient.setting("server_encoding")
    if name != "UTF8":
        return fail(f"the database is in {name}", "create the database with ENCODING 'UTF8'")
    return ok(name)


def schema_version(patient: Patient) -> Answer:
    versions = []
    for component in patient.components:
        try:
            component.check(patient.connection, patient.schema)
        except SchemaError as error:
            return fail(str(error), f"outbox migrate --schema {patient.schema}")
        status = component.status(patient.connection, patient.schema)
        versions.append(f"{status.component} {status.version} of {status.latest}")
        if status.behind:
            return warn(", ".join(versions), f"outbox migrate --schema {patient.schema}")
    return ok(", ".join(versions))


def rights(patient: Patient) -> Answer:
    missing = [
        f"{needed} on {table}"
        for table, needed in (
            ("outbox_event", "SELECT"),
            ("outbox_event", "INSERT"),
            ("outbox_cursor", "INSERT"),
            ("inbox", "INSERT"),
            ("pending_delivery", "DELETE"),
            ("dead_letter", "INSERT"),
        )
        if not patient.one(
            "SELECT has_table_privilege(CAST(:name AS text), :needed)",
            name=f"{patient.schema}.{table}",
            needed=needed,
        )
    ]
    role = patient.one("SELECT current_user")
    if missing:
        return warn(
            f"role {role} lacks {', '.join(missing)}",
            "grant them if this role is a relay's or a worker's; a producer needs INSERT only",
        )
    return ok(f"role {role} may do what relays and workers do")


def unlogged_tables(patient: Patient) -> Answer:
    unlogged = [
        row.relname
        for row in patient.rows(
            "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('{schema}') "
            "AND relkind IN ('r', 'p') AND relpersistence = 'u' ORDER BY relname"
        )
    ]
    if unlogged:
        return fail(
            f"emptied by a crash of the server: {', '.join(unlogged)}",
            "; ".join(f"ALTER TABLE {patient.schema}.{each} SET LOGGED" for each in unlogged),
        )
    return ok("none")


def synchronous_commit(patient: Patient) -> Answer:
    value = patient.setting("synchronous_commit")
    if value == "off":
        return warn(
            "off: a crash of the server takes back commits of the last moments, events among them",
            "ALTER ROLE ... SET synchronous_commit = on for the roles that publish and receive",
        )
    return ok(value)


def durability(patient: Patient) -> Answer:
    off = [name for name in ("fsync", "full_page_writes") if patient.setting(name) == "off"]
    if off:
        return fail(
            f"{' and '.join(off)} off: a crash can destroy the database",
            "turn on in postgresql.conf, unless everything here may be lost",
        )
    return ok("fsync and full_page_writes on")


def prepared_transactions(patient: Patient) -> Answer:
    oldest = patient.one(
        "SELECT max(clock_timestamp() - prepared) FROM pg_prepared_xacts "
        "WHERE database = current_database()"
    )
    if oldest is None:
        return ok("none waiting")
    if oldest > FORGOTTEN_PREPARED_TRANSACTION:
        return fail(
            f"one waits since {_span(oldest)}: its events are committed nowhere, its locks held",
            "find it in pg_prepared_xacts and COMMIT PREPARED or ROLLBACK PREPARED it",
        )
    return ok(f"the oldest waits since {_span(oldest)}")


def long_transactions(patient: Patient) -> Answer:
    rows = patient.rows(
        "SELECT pid, state, application_name, clock_timestamp() - xact_start AS age "
        "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend' AND clock_timestamp() - xact_start > :limit "
        "ORDER BY xact_start LIMIT 3",
        limit=LONG_TRANSACTION,
    )
    if rows:
        told = "; ".join(
            f"pid {row.pid} {row.application_name or '-'} {row.state} since {_span(row.age)}"
            for row in rows
        )
        return warn(
            told,
            "nobody waits for it, but its own events come late and vacuum stands still: "
            "end it, or SELECT pg_terminate_backend(pid)",
        )
    return ok(f"none older than {_span(LONG_TRANSACTION)}")


def default_partition(patient: Patient) -> Answer:
    if patient.one("SELECT EXISTS (SELECT FROM {schema}.outbox_event_default)"):
        return warn(
            "no relay made partitions in time, and events went to outbox_event_default; "
            "they are delivered like all others, but their space does not come back by itself",
            "keep a relay running; delete from the default what is delivered and old enough",
        )
    return ok("outbox_event_default is empty")


def system_identifier(patient: Patient) -> Answer:
    here = patient.one("SELECT system_identifier FROM pg_control_system()")
    adopted = patient.one(
        "SELECT system_identifier FROM {schema}.outbox_cluster ORDER BY adopted_at DESC LIMIT 1"
    )
    if adopted is None:
        return ok(f"{here}; no relay has run here yet")
    if adopted != here:
        return fail(
            f"cursors were stored in cluster {adopted}, this is cluster {here}: "
            "transaction ids of one mean nothing in the other",
            "after a restore: stop all relays and writers, then `outbox adopt-cluster`",
        )
    return ok(str(here))


def timeouts(patient: Patient) -> Answer:
    statement = int(patient.one(_MILLISECONDS, name="statement_timeout"))
    idle = int(patient.one(_MILLISECONDS, name="idle_in_transaction_session_timeout"))
    if 0 < statement < 5_000:
        return warn(
            f"statement_timeout is {statement} ms for this role",
            "5 seconds or more for relays and workers, or pages and handlers are cut off",
        )
    if idle == 0:
        return warn(
            "idle_in_transaction_session_timeout is off",
            "set it (60s): a client that hangs in a transaction holds the locks of its keys",
        )
    return ok(f"statement {statement or 'no limit'}, idle in transaction {idle} (ms)")


def pooler(patient: Patient) -> Answer:
    connection: Any = patient.connection.connection.driver_connection
    told = connection.info.backend_pid
    served_by = {patient.one("SELECT pg_backend_pid()") for _ in range(5)}
    if served_by == {told}:
        return ok("no pooler between")
    if len(served_by) > 1:
        return ok("a pooler in transaction mode: nothing here relies on a session")
    return ok("a pooler: in session mode, or alone on it just now")


def clock_skew(patient: Patient) -> Answer:
    skews = []
    for _ in range(3):
        before = datetime.now(UTC)
        theirs = patient.one("SELECT clock_timestamp()")
        after = datetime.now(UTC)
        skews.append((theirs - (before + (after - before) / 2), after - before))
    skew = abs(min(skews, key=lambda each: each[1])[0])
    told = f"{skew.total_seconds():.3f} s between {socket.gethostname()} and the database"
    if skew > SKEW_THAT_BREAKS:
        return fail(
            told, "run NTP or chrony on both: ids carry time, and the dedupe window reads it"
        )
    if skew > SKEW_WORTH_KNOWING:
        return warn(told, "run NTP or chrony on both")
    return ok(told)


def connections(patient: Patient) -> Answer:
    used = patient.one(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    )
    limit = int(patient.setting("max_connections"))
    told = f"{used} of {limit} in use"
    if used > limit * 0.85:
        return warn(told, "make worker pools smaller, or put a pooler between")
    return ok(told)


def _span(duration: timedelta) -> str:
    return str(timedelta(seconds=round(duration.total_seconds())))


_MILLISECONDS: Final = "SELECT setting FROM pg_settings WHERE name = :name"

CHECKS: Final[tuple[Check[Patient], ...]] = (
    ("server version", server_version),
    ("writable", writable),
    ("encoding", encoding),
    ("schema version", schema_version),
    ("rights", rights),
    ("unlogged tables", unlogged_tables),
    ("synchronous_commit", synchronous_commit),
    ("durability", durability),
    ("prepared transactions", prepared_transactions),
    ("long transactions", long_transactions),
    ("default partition", default_partition),
    ("system identifier", system_identifier),
    ("timeouts", timeouts),
    ("pooler", pooler),
    ("clock skew", clock_skew),
    ("connections", connections),
)
