"""CREATE FUNCTION, as far as the library has it: PL/pgSQL that returns the first value of a single statement.

Its SQL is run as it stands. A function of any other form is not kept, so that calling it is a `ModelGap`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlglot import exp

from saga.testing.model.expressions import Environment
from saga.testing.model.parsing import parse
from saga.testing.model.statements import execute
from saga.testing.model.storage import Function, Storage, Transaction

_SINGLE_STATEMENT = re.compile(
    r"\s*CREATE\s+(OR\s+REPLACE\s+)?FUNCTION\s+(?P<name>\w+\.\w+)\s*\((?P<parameters>[^()]*)\)"
    r"[^$]*\bLANGUAGE\s+plpgsql\b[^$]*\$\$"
    r"\s*DECLARE\s+(?P<variable>\w+)\s+\w+;"
    r"\s*BEGIN\s+(?P<statement>[^;]+?)\s+INTO\s+(?P=variable);"
    r"\s*RETURN\s+(?P=variable);\s*END;?\s*\$\$\s*",
    re.IGNORECASE,
)


def define_function(sql: str, storage: Storage) -> None:
    found = _SINGLE_STATEMENT.fullmatch(sql)
    if found is not None:
        names = tuple(parameter.split()[0] for parameter in found["parameters"].split(","))
        storage.functions[found["name"]] = _function(names, found["statement"])


@cache  # for ever, as all that was parsed
def _function(parameters: tuple[str, ...], sql: str) -> Function:
    def given(node: exp.Expression) -> exp.Expression:
        is_parameter = isinstance(node, exp.Column) and not node.table and node.name in parameters
        return exp.Placeholder(this=node.name) if is_parameter else node

    statement = parse(sql).transform(given)

    def call(storage: Storage, transaction: Transaction, arguments: Sequence[Any]) -> Any:
        values = dict(zip(parameters, arguments, strict=True))
        rows = execute(statement, Environment(storage, transaction, values)).rows
        return rows[0][0] if rows else None

    return call
