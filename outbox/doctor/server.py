"""Is this PostgreSQL, for this role, one that keeps the promises?"""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import text

from outbox.doctor.finding import Answer, fail, ok, warn
from outbox.doctor.patient import Patient

OLDEST_SERVER: Final = 140_000
LONG_TRANSACTION: Final = timedelta(minutes=5)
FORGOTTEN_PREPARED_TRANSACTION: Final = timedelta(minutes=10)
SKEW_WORTH_KNOWING: Final = timedelta(seconds=2)
SKEW_THAT_BREAKS: Final = timedelta(minutes=1)

_SERVED_BY: Final = "SELECT pg_backend_pid()"
_MILLISECONDS: Final = "SELECT setting FROM pg_settings WHERE name = :name"


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
    served_by = {patient.one(_SERVED_BY) for _ in range(5)}
    if served_by == {told}:
        return ok("no pooler between")
    if len(served_by) > 1 or _is_served_by(patient, served_by):
        return ok(
            "a pooler in transaction mode: nothing here relies on a session; applications that publish "
            "connect with prepare_threshold=None, unless it keeps prepared statements"
        )
    return ok("a pooler in session mode")


def _is_served_by(patient: Patient, sessions: set[Any]) -> bool:
    """Whether a second client is served by *sessions* of the first, which is still there."""
    with patient.connection.engine.connect() as second:
        second.execution_options(isolation_level="AUTOCOMMIT")
        return any(second.scalar(text(_SERVED_BY)) in sessions for _ in range(5))


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


def isolation(patient: Patient) -> Answer:
    level = patient.setting("default_transaction_isolation")
    if level != "read committed":
        return warn(
            f"{level}: publishers of one ordered key, and handlers, fail with 40001 and are retried",
            "ALTER ROLE ... SET default_transaction_isolation = 'read committed', or expect it",
        )
    return ok(level)


def encryption(patient: Patient) -> Answer:
    encrypted, local = patient.rows(
        "SELECT coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false), "
        "coalesce(inet_client_addr() <<= '127.0.0.0/8' OR inet_client_addr() = '::1', true)"
    )[0]
    if not encrypted and not local:
        return warn("in the clear over a network", "sslmode=verify-full in the database URL")
    return ok("encrypted" if encrypted else "local connection")


def _span(duration: timedelta) -> str:
    return str(timedelta(seconds=round(duration.total_seconds())))
