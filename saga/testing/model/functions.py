"""CREATE FUNCTION, as far as the library has it: PL/pgSQL that returns the first value of a single statement.

Its SQL is run as it stands. Of a function of any other form only the name is kept, and so it is of one that is defined
with more than one list of parameters: to call either is a `ModelGap`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from psycopg import errors
from sqlglot import exp

from saga.testing.model.expressions import Environment
from saga.testing.model.parsing import parse
from saga.testing.model.statements import execute
from saga.testing.model.storage import Function, Storage, Transaction

_NAME = r"CREATE\s+(?P<replaces>OR\s+REPLACE\s+)?FUNCTION\s+(\"?(?P<schema>\w+)\"?\s*\.\s*)?\"?(?P<name>\w+)\"?"
_NAMED = re.compile(rf"\s*{_NAME}", re.IGNORECASE)
_SINGLE_STATEMENT = re.compile(
    rf"\s*{_NAME}\s*\((?P<parameters>[^()]*)\)"
    r"(?P<options>[^$]*\bLANGUAGE\s+plpgsql\b[^$]*)\$\$"
    r"\s*DECLARE\s+(?P<variable>\w+)\s+\w+;"
    r"\s*BEGIN\s+(?P<statement>[^;]+?)\s+INTO\s+(?P=variable);"
    r"\s*RETURN\s+(?P=variable);\s*END;?\s*\$\$\s*",
    re.IGNORECASE,
)
_PARAMETER = re.compile(
    r"\s*(?!(IN|OUT|INOUT|VARIADIC)\s|.*\bDEFAULT\b)(?P<name>\w+)\s+(?P<type>\w[\w\s\[\]]*?)\s*",
    re.IGNORECASE | re.DOTALL,
)
_STRICT = re.compile(r"\bSTRICT\b|\bRETURNS\s+NULL\s+ON\s+NULL\s+INPUT\b", re.IGNORECASE)


def define_function(sql: str, storage: Storage) -> None:
    named = _NAMED.match(sql)
    if named is None:
        return
    name = f"{named['schema'] or 'public'}.{named['name']}".lower()
    types, function = _read(sql)
    known = storage.functions.get(name, {})
    if function is not None and types in known and not named["replaces"]:
        raise errors.DuplicateFunction(f'function "{name}" already exists with same argument types')
    storage.functions[name] = {**known, types: function}


def _read(sql: str) -> tuple[str, Function | None]:
    """The types of its parameters, as they are written, and what it does; None of either if that is not known."""
    found = _SINGLE_STATEMENT.fullmatch(sql)
    if found is None:
        return "?", None
    listed = found["parameters"].strip()
    parameters = [_PARAMETER.fullmatch(one) for one in listed.split(",")] if listed else []
    known = [one for one in parameters if one is not None]
    if len(known) < len(parameters):
        return "?", None
    function = _function(
        tuple(one["name"].lower() for one in known),
        found["statement"],
        _STRICT.search(found["options"]) is not None,
    )
    return ", ".join(one["type"].lower() for one in known), function


@cache  # for ever, as all that was parsed
def _function(parameters: tuple[str, ...], sql: str, is_strict: bool) -> Function:
    def given(node: exp.Expression) -> exp.Expression:
        is_parameter = isinstance(node, exp.Column) and not node.table and node.name in parameters
        return exp.Placeholder(this=node.name) if is_parameter else node

    statement = parse(sql).transform(given)

    def call(storage: Storage, transaction: Transaction, arguments: Sequence[Any]) -> Any:
        if len(arguments) != len(parameters):
            raise errors.UndefinedFunction("no function of that name takes so many arguments")
        if is_strict and None in arguments:
            return None
        values = dict(zip(parameters, arguments, strict=True))
        rows = execute(statement, Environment(storage, transaction, values)).rows
        return rows[0][0] if rows else None

    return call
