"""Statements whose schema name is put in once and whose parsed form is then kept."""

from __future__ import annotations

from functools import lru_cache

from sqlalchemy import TextClause, text

from outbox.sql import in_schema


@lru_cache(maxsize=512)
def statement(template: str, schema: str) -> TextClause:
    """*template* with `{schema}` replaced, ready to execute with bound `:parameters`."""
    return text(in_schema(template, schema))


def storable(value: str, limit: int) -> str:
    """*value* as PostgreSQL can store it: no NUL, no half surrogate pair, *limit* characters.

    Text that came from outside, or from an exception, may hold either; losing a row over it would
    lose the evidence.
    """
    cleaned = value.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
    return cleaned if len(cleaned) <= limit else f"{cleaned[: limit - 1]}…"
