"""Poolers between a client and PostgreSQL, such as pgbouncer in transaction mode.

A statement prepared in one of a pooler's sessions is unknown in the next, and psycopg prepares what is run often. Newer
poolers keep count of them (pgbouncer from 1.21 with `max_prepared_statements`), older ones do not, and none says which
it is. So nothing is prepared where a pooler is seen; what else is sent relies on no session.
"""

from __future__ import annotations

from typing import Any

import psycopg
from sqlalchemy import Engine, event


def is_pooled(connection: psycopg.Connection[Any]) -> bool:
    """Whether statements of *connection*, which is in autocommit, are answered by another process than it was told."""
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    return row is None or row[0] != connection.info.backend_pid


def prepare_nothing_if_pooled(connection: psycopg.Connection[Any]) -> None:
    """Behind a pooler, let *connection*, which is in autocommit, prepare no statement."""
    if is_pooled(connection):
        connection.prepare_threshold = None


def mind_poolers(engine: Engine) -> Engine:
    """Let no connection of *engine* prepare statements behind a pooler. Returns *engine*."""
    event.listen(engine, "connect", _on_connect)
    return engine


def _on_connect(connection: Any, _record: object) -> None:
    if not isinstance(connection, psycopg.Connection):
        return
    before = connection.autocommit
    connection.autocommit = True
    try:
        prepare_nothing_if_pooled(connection)
    finally:
        connection.autocommit = before
