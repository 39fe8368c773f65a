"""A statement of scalars through libpq, as a cursor of psycopg's would send it, at a third of the cursor's CPU time.

A cursor is made for much that publishing has no use for: rows, adapters, queries of all forms. Here the parameters are
given as libpq takes them, and waiting is psycopg's own: it can be interrupted, and yields where threads are green.
Wherever a cursor would do something else (in an idle or failed transaction, in pipeline mode, with another encoding,
with cursors that bind on the client) the caller is told to use one.

The first statements of a transaction go out in one message with its BEGIN (libpq's pipeline mode): one round trip for
all of them, where a cursor makes one for each. Each begins when the one before it has ended, and none after one that
has failed.

Statements are prepared when a cursor would do it: psycopg's own account of what is prepared on a connection is asked
and told. So `prepare_threshold` holds here too, which is None behind poolers, and what psycopg or the
caller throws away (`DEALLOCATE ALL` after a rollback, `DISCARD ALL`) is prepared anew. The account is none of psycopg's
public names: where a release has another one, nothing is prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

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

_ACCOUNT: Final = "_prepared" if _KNOWS_THE_ACCOUNT else "account unknown"
"""The attribute of a connection that says what is prepared, and how often a statement must come for that."""

TEXT, BINARY = 0, 1
_UTF8: Final = b"UTF8"
_COMMAND_OK, _INTRANS, _IDLE, _NO_PIPELINE = (
    ExecStatus.COMMAND_OK,
    TransactionStatus.INTRANS,
    TransactionStatus.IDLE,
    PipelineStatus.OFF,
)
_DONE: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)
_BEGIN: Final = b"BEGIN"


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement as psycopg's account names it."""

    query: bytes
    types: tuple[int, ...] = ()
    """None given: the server takes those of the columns."""


class Begun(NamedTuple):
    """What has come of the first statements of a transaction."""

    done: int
    """So many of them; those behind one that failed were not run."""
    result: PGresult
    """Of the last one, or of the first that failed."""


def write_directly(connection: psycopg.Connection[Any], sql: str, params: Sequence[Any]) -> bool:
    """Execute *sql*, `%s` for each of *params*, which are given the types of their columns; its result is dropped.

    False, with nothing done, if a parameter is no scalar or holds a NUL, or as `send_directly`. Raises what a cursor
    raises.
    """
    given = _as_libpq_takes_them(params)
    return given is not None and send_directly(connection, direct_statement(sql), *given)


def send_directly(
    connection: psycopg.Connection[Any],
    statement: Statement,
    values: Sequence[bytes | None],
    formats: Sequence[int],
) -> bool:
    """Execute *statement* with *values* as libpq takes them, each in its format (`TEXT`, `BINARY`); drop its result.

    False, with nothing done, where a cursor would do something else. Raises what a cursor raises.
    """
    pgconn = connection.pgconn
    with connection.lock:
        # In here, as another thread's commit in between would leave the statement to commit by itself.
        if (
            pgconn.transaction_status != _INTRANS
            or pgconn.pipeline_status != _NO_PIPELINE
            or pgconn.parameter_status(b"client_encoding") != _UTF8
            or (
                connection.cursor_factory is not psycopg.Cursor
                and not _binds_on_the_server(connection)
            )
        ):
            return False
        account: Any = getattr(connection, _ACCOUNT, None)
        if account is None:
            pgconn.send_query_params(statement.query, values, None, formats)
            results_of(connection)
            return True
        # As `BaseCursor._maybe_prepare_gen` does it.
        prepare, name = account.get(statement)
        if prepare is Prepare.YES:
            pgconn.send_query_prepared(name, values, formats)
            account.maybe_add_to_cache(statement, prepare, name)
            for result in connection.wait(generators.execute(pgconn)):  # as `results_of`
                if result.status != _COMMAND_OK:
                    raise error_from_result(result, encoding="utf-8")
            return True
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
    return True


def command_directly(connection: psycopg.Connection[Any], *commands: str) -> bool:
    """Execute *commands* in one message: constants that take no values and return no rows, such as SAVEPOINT.

    psycopg's account is not told. After a ROLLBACK TO it would have everything prepared anew, as types may
    have changed; should a plan fail for that, so does its transaction, and after that it is.
    False, with nothing done, where a cursor would do something else. Raises what a cursor raises.
    """
    pgconn = connection.pgconn
    with connection.lock:
        if (
            pgconn.transaction_status not in (_INTRANS, TransactionStatus.INERROR)
            or pgconn.pipeline_status != _NO_PIPELINE
        ):
            return False
        pgconn.send_query("; ".join(commands).encode())
        results_of(connection)
    return True


def can_begin_directly(connection: psycopg.Connection[Any]) -> bool:
    """Whether `begin_directly` would do on *connection* now what a cursor's first statements do."""
    pgconn = connection.pgconn
    return (
        pgconn.transaction_status == _IDLE
        and pgconn.pipeline_status == _NO_PIPELINE
        and not connection.autocommit
        # Else its BEGIN says more:
        and connection.isolation_level is None
        and connection.read_only is None
        and connection.deferrable is None
        and pgconn.parameter_status(b"client_encoding") == _UTF8
        and _binds_on_the_server(connection)
    )


def _binds_on_the_server(connection: psycopg.Connection[Any]) -> bool:
    """Whether its cursors are known to: what makes them may be any function."""
    made_by: object = connection.cursor_factory
    return isinstance(made_by, type) and not issubclass(made_by, psycopg.ClientCursor)


def begin_directly(
    connection: psycopg.Connection[Any], statements: Sequence[tuple[Statement, Sequence[Any]]]
) -> Begun | None:
    """BEGIN and *statements*, each with its scalars, in one message.

    None, with nothing done, if a parameter is no scalar or holds a NUL, or where `can_begin_directly` holds no longer:
    another thread may have begun meanwhile. Raises `psycopg.OperationalError` for a connection that is lost. An
    interrupt from the keyboard cancels what runs, as with a cursor, and leaves a transaction that failed. Whatever else
    is raised meanwhile, by a signal for instance, leaves a connection that says it is active, and is of no more use.
    """
    given = [_as_libpq_takes_them(params) for _, params in statements]
    pgconn = connection.pgconn
    with connection.lock:
        if not can_begin_directly(connection):
            return None
        account: Any = getattr(connection, _ACCOUNT, None)
        commands: list[Callable[[], None]] = [partial(pgconn.send_query_params, _BEGIN, None)]
        prepared: list[tuple[int, Any]] = []
        for (statement, _), one in zip(statements, given, strict=True):
            if one is None:
                return None
            values, formats = one
            prepare, name = (None, b"") if account is None else account.get(statement)
            if prepare is not None and prepare is Prepare.SHOULD:
                commands.append(partial(pgconn.send_prepare, name, statement.query))
            if name:
                commands.append(partial(pgconn.send_query_prepared, name, values, formats))
            else:
                commands.append(
                    partial(pgconn.send_query_params, statement.query, values, None, formats)
                )
            prepared.append((len(commands) - 1, (statement, prepare, name)))
        results = _in_one_message(connection, commands)
        # Of those that failed, or came after one that did, nothing is noted.
        for place, (statement, prepare, name) in prepared if account is not None else ():
            if results[place].status in _DONE:
                key = account.maybe_add_to_cache(statement, prepare, name)
                if key is not None:
                    account.validate(key, prepare, name, [results[place]])
        for place, result in enumerate(results):
            if result.status not in _DONE:
                return Begun(sum(last < place for last, _ in prepared), result)
        if account is not None:
            connection.wait(account.maintain_gen(connection))
    return Begun(len(statements), results[-1])


def _in_one_message(
    connection: psycopg.Connection[Any], commands: Sequence[Callable[[], None]]
) -> list[PGresult]:
    pgconn = connection.pgconn
    pgconn.enter_pipeline_mode()
    try:
        for command in commands:
            command()
        pgconn.pipeline_sync()
        results = connection.wait(_results_until_sync(pgconn))
    except BaseException:
        with suppress(psycopg.Error):  # where something is left to be read, it has to stay
            pgconn.exit_pipeline_mode()
        raise
    pgconn.exit_pipeline_mode()
    return results


def _results_until_sync(pgconn: PGconn) -> PQGen[list[PGresult]]:
    yield from generators.send(pgconn)
    results: list[PGresult] = []
    while True:
        found = yield from generators.fetch_many(pgconn)
        if found and found[-1].status == ExecStatus.PIPELINE_SYNC:
            return results
        results += found


def _as_libpq_takes_them(
    params: Sequence[Any],
) -> tuple[list[bytes | None], list[int]] | None:
    """Values and their formats; None if one is no scalar."""
    values: list[bytes | None] = []
    formats: list[int] = []
    for param in params:
        kind = type(param)
        if param is None:
            values.append(None)
        elif kind is str and "\x00" not in param:  # which would end it unnoticed
            values.append(param.encode())
        elif kind is int:
            values.append(b"%d" % param)
        elif kind is bool:
            values.append(b"t" if param else b"f")
        elif kind is bytes or kind is UUID:
            values.append(param if kind is bytes else param.bytes)
            formats.append(BINARY)
            continue
        else:
            return None
        formats.append(TEXT)
    return values, formats


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
def direct_statement(sql: str) -> Statement:
    """*sql*, with `%s` for each parameter, as libpq takes it."""
    first, *rest = sql.split("%s")
    return Statement(
        (first + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))).encode()
    )
