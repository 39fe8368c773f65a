"""A statement of scalars through libpq, as a cursor of psycopg's would send it, at a third of the cursor's CPU time.

A cursor is made for much that publishing has no use for: rows, adapters, prepared statements. Here the parameters are
given as libpq takes them, and waiting is psycopg's own: it can be interrupted, and yields where threads are green.
Wherever a cursor would do something else, in an idle or failed transaction, in pipeline mode, with another encoding,
the caller is told to use one. Nothing is prepared, so any pooler will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import generators
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, PipelineStatus, TransactionStatus

_TEXT, _BINARY = 0, 1
_UTF8: Final = b"UTF8"


def can_write_directly(connection: psycopg.Connection[Any]) -> bool:
    """Whether `write_directly` would do on *connection* now what a cursor does."""
    pgconn = connection.pgconn
    return (
        pgconn.transaction_status == TransactionStatus.INTRANS
        and pgconn.pipeline_status == PipelineStatus.OFF
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
    with connection.lock:
        connection.pgconn.send_query_params(_numbered(sql), values, None, formats)
        (result,) = connection.wait(generators.execute(connection.pgconn))
    if result.status != ExecStatus.COMMAND_OK:
        raise error_from_result(result, encoding="utf-8")
    return True


@lru_cache(maxsize=512)
def _numbered(sql: str) -> bytes:
    first, *rest = sql.split("%s")
    return (first + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))).encode()
