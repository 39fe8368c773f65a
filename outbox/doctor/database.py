"""All checks of a database, in the order in which a person would make them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from outbox.doctor import server, tables
from outbox.doctor.finding import Check, Finding, Level, run
from outbox.doctor.patient import Patient
from outbox.sql import DEFAULT_SCHEMA

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from outbox.schema import Component

CHECKS: Final[tuple[Check[Patient], ...]] = (
    ("server version", server.server_version),
    ("writable", server.writable),
    ("encoding", server.encoding),
    ("schema version", tables.schema_version),
    ("rights", tables.rights),
    ("unlogged tables", tables.unlogged_tables),
    ("synchronous_commit", server.synchronous_commit),
    ("durability", server.durability),
    ("isolation", server.isolation),
    ("prepared transactions", server.prepared_transactions),
    ("long transactions", server.long_transactions),
    ("default partition", tables.default_partition),
    ("system identifier", tables.system_identifier),
    ("timeouts", server.timeouts),
    ("pooler", server.pooler),
    ("clock skew", server.clock_skew),
    ("connections", server.connections),
    ("encryption", server.encryption),
)


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
