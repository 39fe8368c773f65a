"""Statements whose schema name is put in once and whose parsed form is then kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.rows import namedtuple_row
from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox.direct import Statement, begin_directly, can_begin_directly
from outbox.sql import in_schema

_PARAMETER: Final = re.compile(r"(?<![:\w]):(\w+)")


@lru_cache(maxsize=512)
def statement(template: str, schema: str) -> TextClause:
    """*template* with `{schema}` replaced, ready to execute with bound `:parameters`."""
    return text(in_schema(template, schema))


def fetch(session: Session, template: str, values: Mapping[str, Any], schema: str) -> Sequence[Any]:
    """The rows of *template* with its `:parameters`, by name and by number; none of what has none.

    Does what `session.execute(statement(...))` does, on psycopg's own cursor where that is the
    driver: at a fifth of the CPU time. Raises the same errors.
    """
    driver = session.connection().connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        result = session.execute(statement(template, schema), values)
        return result.all() if result.returns_rows else ()  # type: ignore[attr-defined]
    sql = _for_psycopg(template, schema)
    with driver.cursor(row_factory=namedtuple_row) as cursor, _errors_of_the_session(sql, values):
        cursor.execute(sql, values)
        return cursor.fetchall() if cursor.description else ()


def begin_with(
    session: Session, statements: Sequence[tuple[str, Mapping[str, Any]]], schema: str
) -> Sequence[tuple[Any, ...]]:
    """The rows of the last of *statements*, templates with their values, that *session*'s transaction begins with.

    Does what `fetch` does with one after the other, in a single round trip, BEGIN and all, where the driver is psycopg
    and nothing has run in the transaction yet. Raises the same errors.
    """
    driver = session.connection().connection.driver_connection
    if isinstance(driver, psycopg.Connection) and can_begin_directly(driver):
        given = []
        for template, values in statements:
            direct, names = _for_libpq(template, schema)
            given.append((direct, [values[name] for name in names]))
        with _errors_of_the_session(given[0][0].query, statements[0][1]):
            begun = begin_directly(driver, given)
        if begun is not None:
            done, result = begun
            if done < len(given):
                with _errors_of_the_session(given[done][0].query, statements[done][1]):
                    raise error_from_result(result, encoding="utf-8")
            loading = Transformer.from_context(driver)
            loading.set_pgresult(result)
            return loading.load_rows(0, result.ntuples, tuple)
    rows: Sequence[Any] = ()
    for template, values in statements:
        rows = fetch(session, template, values, schema)
    return rows


@contextmanager
def _errors_of_the_session(sql: bytes, values: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise DBAPIError.instance(sql.decode(), dict(values), error, psycopg.Error) from error


@lru_cache(maxsize=512)
def _for_psycopg(template: str, schema: str) -> bytes:
    sql = in_schema(template, schema).replace("%", "%%")
    return _PARAMETER.sub(r"%(\1)s", sql).encode()


@lru_cache(maxsize=512)
def _for_libpq(template: str, schema: str) -> tuple[Statement, Sequence[str]]:
    """The statement, and the names of its parameters in their order."""
    sql = in_schema(template, schema)
    names = tuple(dict.fromkeys(_PARAMETER.findall(sql)))
    number = {name: f"${place}" for place, name in enumerate(names, 1)}
    return Statement(_PARAMETER.sub(lambda found: number[found[1]], sql).encode()), names


def storable(value: str, limit: int) -> str:
    """*value* as PostgreSQL can store it: no NUL, no half surrogate pair, *limit* characters.

    Text that came from outside, or from an exception, may hold either; losing a row over it would
    lose the evidence.
    """
    cleaned = value.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
    return cleaned if len(cleaned) <= limit else f"{cleaned[: limit - 1]}…"
