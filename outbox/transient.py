"""Which database errors pass by themselves, and which mean that nothing can be known.

Decided by SQLSTATE, not by exception class: SQLAlchemy and psycopg both file a deadlock and a wrong
password under OperationalError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

_PASSING: Final = frozenset({
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "53300",  # too_many_connections
})  # fmt: skip
_CONNECTION_CLASS: Final = "08"
_LOCK_NOT_AVAILABLE: Final = "55P03"


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction, begun anew, may well succeed: deadlocks, lost connections.

    Not so for `idle_in_transaction_session_timeout`: a handler that was too slow once will be again.
    """
    return any(_passes(one) for one in _with_causes(error))


def is_lock_timeout(error: BaseException) -> bool:
    """Whether a lock was not had within `lock_timeout`."""
    return any(sqlstate(one) == _LOCK_NOT_AVAILABLE for one in _with_causes(error))


def is_database_error(error: BaseException) -> bool:
    """Whether the database refused or could not be reached, for whatever reason."""
    return isinstance(error, DBAPIError | PoolTimeout | psycopg.Error)


def sqlstate(error: BaseException) -> str | None:
    """The five-character code that PostgreSQL gave, or None."""
    code = getattr(getattr(error, "orig", None) or error, "sqlstate", None)
    return code if isinstance(code, str) else None


def _passes(error: BaseException) -> bool:
    if not is_database_error(error):
        return False
    code = sqlstate(error)
    if code is not None:
        return code in _PASSING or code.startswith(_CONNECTION_CLASS)
    if isinstance(error, PoolTimeout) or getattr(error, "connection_invalidated", False):
        return True
    # Without a code it never came from the server: the connection broke, or could not be made.
    return isinstance(getattr(error, "orig", None) or error, psycopg.OperationalError)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    # A handler may have wrapped it: `raise BookingFailed from error`.
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__
