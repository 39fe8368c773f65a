"""A statement of scalars through libpq, as a cursor of psycopg's would send it, at a third of the cursor's CPU time.

A cursor is made for much that publishing has no use for: rows, adapters, queries of all forms. Here the parameters are
given as libpq takes them, and waiting is psycopg's own: it can be interrupted, and yields where threads are green.
Wherever a cursor would do something else, in an idle or failed transaction, in pipeline mode, with another encoding,
the caller is told to use one.

Statements are prepared when a cursor would do it: psycopg's own account of what is prepared on a connection is asked
and told. So `prepare_threshold` holds here too, which is None behind poolers, and what psycopg or the
caller throws away (`DEALLOCATE ALL` after a rollback, `DISCARD ALL`) is prepared anew. The account is none of psycopg's
public names: where a release has another one, nothing is prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import generators
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGresult

try:
    from psycopg._preparing import Prepare, PrepareManager
except ImportError:  # pragma: no cover
    _KNOWS_THE_ACCOUNT = False
else:
    _KNOWS_THE_ACCOUNT = [
        [*signature(method).parameters]
        for method in (
            PrepareManager.get,
            PrepareManager.maybe_add_to_cache,
            PrepareManager.validate,
            PrepareManager.maintain_gen,
        )
    ] == [
        ["self", "query", "prepare"],
        ["self", "query", "prep", "name"],
        ["self", "key", "prep", "name", "results"],
        ["self", "conn"],
    ]

_TEXT, _BINARY = 0, 1
_UTF8: Final = b"UTF8"
_COMMAND_OK, _INTRANS, _NO_PIPELINE = (
    ExecStatus.COMMAND_OK,
    TransactionStatus.INTRANS,
    PipelineStatus.OFF,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement as psycopg's account names it."""

    query: bytes
    types: tuple[int, ...] = ()
    """None given: the server takes those of the columns."""


def can_write_directly(connection: psycopg.Connection[Any]) -> bool:
    """Whether `write_directly` would do on *connection* now what a cursor does."""
    pgconn = connection.pgconn
    return (
        pgconn.transaction_status == _INTRANS
        and pgconn.pipeline_status == _NO_PIPELINE
        and pgconn.parameter_status(b"client_encoding") == _UTF8
    )


def write_directly(connection: psycopg.Connection[Any], sql: str, params: Sequence[Any]) -> bool:
    """Execute *sql*, `%s` for each of *params*, which are given the types of their columns; its result is dropped.

    False, with nothing done, if a parameter is no scalar. Raises what a cursor raises.
    """
    values: list[bytes | None] = []
    formats: list[int] = []
    for param in params:
        kind = type(param)
        if param is None:
            values.append(None)
        elif kind is str:
            values.append(param.encode())
        elif kind is int:
            values.append(b"%d" % param)
        elif kind is bytes or kind is UUID:
            values.append(param if kind is bytes else param.bytes)
            formats.append(_BINARY)
            continue
        else:
            return False
        formats.append(_TEXT)
    statement = _statement(sql)
    with connection.lock:
        account = _account(connection)
        if account is None:
            connection.pgconn.send_query_params(statement.query, values, None, formats)
            results_of(connection)
        else:
            _execute(connection, account, statement, values, formats)
    return True


def _account(connection: psycopg.Connection[Any]) -> Any:
    """What is prepared on *connection*, and how often a statement must come for that; None if nothing is to be."""
    if _KNOWS_THE_ACCOUNT and not issubclass(connection.cursor_factory, psycopg.ClientCursor):
        return getattr(connection, "_prepared", None)
    return None


def _execute(
    connection: psycopg.Connection[Any],
    account: Any,
    statement: Statement,
    values: Sequence[bytes | None],
    formats: Sequence[int],
) -> None:
    """As `BaseCursor._maybe_prepare_gen` does it."""
    pgconn = connection.pgconn
    prepare, name = account.get(statement)
    if prepare is Prepare.YES:
        pgconn.send_query_prepared(name, values, formats)
        account.maybe_add_to_cache(statement, prepare, name)
        results_of(connection)
        return
    if prepare is Prepare.SHOULD:
        pgconn.send_prepare(name, statement.query)
        results_of(connection)
        pgconn.send_query_prepared(name, values, formats)
    else:
        pgconn.send_query_params(statement.query, values, None, formats)
    key = account.maybe_add_to_cache(statement, prepare, name)
    results = results_of(connection)
    if key is not None:
        account.validate(key, prepare, name, results)
    connection.wait(account.maintain_gen(connection))


def results_of(
    connection: psycopg.Connection[Any], expected: ExecStatus = _COMMAND_OK
) -> list[PGresult]:
    """What has come of the statement that was sent last. Raises its error where that is not as *expected*."""
    results: list[PGresult] = connection.wait(generators.execute(connection.pgconn))
    for result in results:
        if result.status != expected:
            raise error_from_result(result, encoding="utf-8")
    return results


@lru_cache(maxsize=512)
def _statement(sql: str) -> Statement:
    first, *rest = sql.split("%s")
    return Statement(
        (first + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))).encode()
    )
