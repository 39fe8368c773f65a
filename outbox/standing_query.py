"""A statement that is asked again and again, and whose answer may be taken later than it is asked for.

In between the server works, and so does Python. There is one answer at most. While it is on its way the connection is
busy and the server holds the statement's snapshot, which a full socket makes it hold for longer: so whoever asks early
must `settle` before anything that waits, and before the connection is used for something else. After that the answer
lies in memory, and nothing holds anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Final

import psycopg
from psycopg import generators
from psycopg.adapt import Transformer
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult

from outbox.direct import results_of

_PLACE: Final = re.compile(r"%\((\w+)\)s")
_numbers: Final = count(1)


class StandingQuery:
    """For one thread, and a connection that is in autocommit or in a transaction of the caller's."""

    def __init__(self, connection: psycopg.Connection[Any], sql: str) -> None:
        """*sql*: with `%(name)s` for its parameters. It is prepared, unless the connection prepares nothing."""
        self._connection = connection
        self._names = list(dict.fromkeys(_PLACE.findall(sql)))
        number = {one: str(place) for place, one in enumerate(self._names, 1)}
        self._sql = _PLACE.sub(lambda found: "$" + number[found[1]], sql).encode()
        self._name = b"outbox_%d" % next(_numbers)
        self._is_prepared = False
        self._is_asked = False
        self._answer: PGresult | None = None
        self._loading = Transformer.from_context(connection)

    def ask(self, given: Mapping[str, Any]) -> None:
        """Send it, with the values that *given* has for its parameters; an answer that was not taken is dropped."""
        self.forget()
        pgconn = self._connection.pgconn
        values = [_text(given[name]) for name in self._names]
        if self._connection.prepare_threshold is None:
            pgconn.send_query_params(self._sql, values, result_format=Format.BINARY)
        else:
            if not self._is_prepared:
                pgconn.send_prepare(self._name, self._sql)
                results_of(self._connection)
                self._is_prepared = True
            pgconn.send_query_prepared(self._name, values, result_format=Format.BINARY)
        self._is_asked = True
        self._connection.wait(generators.send(pgconn))

    def settle(self) -> None:
        """Have the whole answer in memory, if one is on its way. Raises what the statement has raised."""
        if self._is_asked:
            self._is_asked = False
            (self._answer,) = results_of(self._connection, ExecStatus.TUPLES_OK)

    def rows(self, make: Callable[[Sequence[Any]], Any]) -> list[Any]:
        """The answer's rows; waits for them. It is taken with this."""
        self.settle()
        assert self._answer is not None, "nothing was asked"
        answer, self._answer = self._answer, None
        self._loading.set_pgresult(answer)
        return self._loading.load_rows(0, answer.ntuples, make)

    def forget(self) -> None:
        """Drop an answer that was not taken."""
        self.settle()
        self._answer = None


def _text(value: Any) -> bytes:
    if isinstance(value, list):
        return b"{%s}" % ",".join(map(str, value)).encode()
    return str(value).encode()
