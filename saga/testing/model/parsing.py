"""SQL text to what sqlglot makes of it, once per text."""

from __future__ import annotations

from functools import cache

import sqlglot
from sqlglot import exp
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers


@cache
def parse(sql: str) -> exp.Expression:
    parsed = sqlglot.parse_one(sql, read="postgres")
    assert isinstance(parsed, exp.Expression)
    return normalize_identifiers(parsed, dialect="postgres")
