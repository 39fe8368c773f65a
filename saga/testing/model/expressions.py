"""SQL expressions of the PostgreSQL dialect, compiled to Python functions of an environment.

sqlglot parses; each node becomes a closure once per statement text. NULL is None, and truth is three-valued. What is
not understood raises `ModelGap`: the model never guesses.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from psycopg import errors
from sqlglot import exp

if TYPE_CHECKING:
    from saga.testing.model.storage import Storage, Transaction


class ModelGap(NotImplementedError):
    """The model database does not know this SQL: write the test against PostgreSQL, or teach the model."""


@dataclass
class Environment:
    """What an expression can see: the rows in scope by table name or alias, parameters, and the transaction."""

    storage: Storage
    transaction: Transaction
    params: Mapping[str, Any] | Sequence[Any]
    rows: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    tables: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """Results of common table expressions."""
    group: list[dict[str, Mapping[str, Any] | None]] | None = None
    run_query: Callable[[exp.Expression, Environment], list[tuple[Any, ...]]] | None = None

    def scope(self, rows: Mapping[str, Mapping[str, Any] | None]) -> Environment:
        return Environment(
            self.storage,
            self.transaction,
            self.params,
            {**self.rows, **rows},
            self.tables,
            None,
            self.run_query,
        )


Compiled = Callable[[Environment], Any]


def compile_expression(node: exp.Expression) -> Compiled:
    """The function that computes *node*. Raises `ModelGap`."""
    for kind, build in _BUILDERS.items():
        if isinstance(node, kind):
            return build(node)
    raise ModelGap(
        f"the model database does not know {type(node).__name__}: {node.sql('postgres')}"
    )


def column_value(env: Environment, table: str, name: str) -> Any:
    if table:
        row = env.rows.get(table)
        if table not in env.rows:
            raise ModelGap(f"no table {table!r} in scope for column {name!r}")
        return None if row is None else row[name]
    for row in reversed(env.rows.values()):
        if row is not None and name in row:
            return row[name]
    if any(row is None for row in env.rows.values()):
        return None
    raise ModelGap(f"no column {name!r} in scope; tables are {sorted(env.rows)}")


def _column(node: exp.Expression) -> Compiled:
    assert isinstance(node, exp.Column)
    table, name = node.table, node.name
    return lambda env: column_value(env, table, name)


def _placeholder(node: exp.Expression) -> Compiled:
    name = node.name
    return lambda env: env.params[name]  # type: ignore[call-overload]


def _literal(node: exp.Expression) -> Compiled:
    assert isinstance(node, exp.Literal)
    text = node.this
    value: Any = text if node.is_string else (Decimal(text) if "." in text else int(text))
    return lambda _: value


def alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Bring two values of different Python types together, as PostgreSQL does with untyped literals."""
    if type(left) is type(right) or left is None or right is None:
        return left, right
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str) and not isinstance(other, str):
            changed: Any = one
            if isinstance(other, UUID):
                changed = UUID(one)
            elif isinstance(other, datetime):
                changed = datetime.fromisoformat(one)
            elif isinstance(other, bytes):
                changed = _bytes(one)
            elif isinstance(other, list):
                changed = [alike(item, other[0])[0] if other else item for item in items_of(one)]
            elif isinstance(other, int | float | Decimal):
                changed = type(other)(one)
            return (changed, right) if one is left else (left, changed)
    return left, right


def _comparison(compare: Callable[[Any, Any], bool]) -> Callable[[exp.Expression], Compiled]:
    def build(node: exp.Expression) -> Compiled:
        if isinstance(node.expression, exp.Any | exp.All):
            return _quantified(node, compare)
        left, right = compile_expression(node.this), compile_expression(node.expression)

        def run(env: Environment) -> bool | None:
            a, b = alike(left(env), right(env))
            return None if a is None or b is None else compare(a, b)

        return run

    return build


def _quantified(node: exp.Expression, compare: Callable[[Any, Any], bool]) -> Compiled:
    left, items = compile_expression(node.this), compile_expression(node.expression.this)
    decisive = isinstance(node.expression, exp.Any)

    def run(env: Environment) -> bool | None:
        value, listed = left(env), items(env)
        return None if listed is None else _met(value, items_of(listed), compare, decisive)

    return run


def _met(
    value: Any, items: Iterable[Any], compare: Callable[[Any, Any], bool], decisive: bool
) -> bool | None:
    """*decisive* if one of *items* compares so, its contrary if none does, and NULL if only a NULL among them could."""
    is_open = False
    for item in items:
        if value is None or item is None:
            is_open = True
        elif compare(*alike(value, item)) is decisive:
            return decisive
    return None if is_open else not decisive


def _arithmetic(compute: Callable[[Any, Any], Any]) -> Callable[[exp.Expression], Compiled]:
    def build(node: exp.Expression) -> Compiled:
        left, right = compile_expression(node.this), compile_expression(node.expression)

        def run(env: Environment) -> Any:
            a, b = alike(left(env), right(env))
            return None if a is None or b is None else compute(a, b)

        return run

    return build


def _divide(a: Any, b: Any) -> Any:
    return int(a / b) if isinstance(a, int) and isinstance(b, int) else a / b


def _and(node: exp.Expression) -> Compiled:
    left, right = compile_expression(node.this), compile_expression(node.expression)

    def run(env: Environment) -> bool | None:
        a = left(env)
        if a is False:
            return False
        b = right(env)
        return False if b is False else (None if a is None or b is None else True)

    return run


def _or(node: exp.Expression) -> Compiled:
    left, right = compile_expression(node.this), compile_expression(node.expression)

    def run(env: Environment) -> bool | None:
        a = left(env)
        if a is True:
            return True
        b = right(env)
        return True if b is True else (None if a is None or b is None else False)

    return run


def _not(node: exp.Expression) -> Compiled:
    inner = compile_expression(node.this)

    def run(env: Environment) -> bool | None:
        value = inner(env)
        return None if value is None else not value

    return run


def _is(node: exp.Expression) -> Compiled:
    left, right = compile_expression(node.this), compile_expression(node.expression)
    if node.args.get("negate"):  # IS NOT, which earlier releases of sqlglot read as NOT (… IS …)
        return lambda env: left(env) is not right(env)
    return lambda env: left(env) is right(env)


def _in(node: exp.Expression) -> Compiled:
    assert isinstance(node, exp.In)
    left = compile_expression(node.this)
    query = node.args.get("query")
    items = [compile_expression(item) for item in node.expressions]

    def run(env: Environment) -> bool | None:
        if query is not None:
            found = [row[0] if len(row) == 1 else row for row in _rows_of(query, env)]
        else:
            found = [item(env) for item in items]
        return _met(left(env), found, operator.eq, True)

    return run


def _rows_of(query: exp.Expression, env: Environment) -> list[tuple[Any, ...]]:
    assert env.run_query is not None
    return env.run_query(query.this if isinstance(query, exp.Subquery) else query, env)


def _scalar_subquery(node: exp.Expression) -> Compiled:
    def run(env: Environment) -> Any:
        rows = _rows_of(node, env)
        return rows[0][0] if rows else None

    return run


def _exists(node: exp.Expression) -> Compiled:
    return lambda env: bool(_rows_of(node.this, env))


def _between(node: exp.Expression) -> Compiled:
    value, low, high = (compile_expression(node.args[name]) for name in ("this", "low", "high"))

    def run(env: Environment) -> bool | None:
        a, b, c = value(env), low(env), high(env)
        return (
            None if a is None or b is None or c is None else alike(a, b)[1] <= a <= alike(a, c)[1]
        )

    return run


def _case(node: exp.Expression) -> Compiled:
    assert isinstance(node, exp.Case)
    subject = None if node.this is None else compile_expression(node.this)
    branches = [
        (compile_expression(branch.this), compile_expression(branch.args["true"]))
        for branch in node.args["ifs"]
    ]
    default = node.args.get("default")
    otherwise = None if default is None else compile_expression(default)

    def run(env: Environment) -> Any:
        for condition, result in branches:
            met = (
                condition(env) is True
                if subject is None
                else operator.eq(*alike(subject(env), condition(env)))
            )
            if met:
                return result(env)
        return None if otherwise is None else otherwise(env)

    return run


def caster(type_name: str) -> Callable[[Any], Any]:
    """The function that makes a value one of SQL type *type_name*; None stays None."""
    name = type_name.upper()
    convert: Callable[[Any], Any]
    if name.endswith("[]"):
        inner = caster(name[:-2])
        convert = lambda value: [inner(item) for item in items_of(value)]  # noqa: E731
    elif name in {"UUID"}:
        convert = lambda value: value if isinstance(value, UUID) else UUID(str(value))  # noqa: E731
    elif name in {"INT", "INTEGER", "BIGINT", "SMALLINT", "XID8"}:
        convert = int
    elif name in {"TEXT", "REGCLASS"} or name.startswith(("VARCHAR", "CHAR")):
        convert = str
    elif name.startswith(("DECIMAL", "NUMERIC")):
        convert = lambda value: Decimal(str(value))  # noqa: E731
    elif name in {"TIMESTAMPTZ", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"}:
        convert = lambda value: datetime.fromisoformat(value) if isinstance(value, str) else value  # noqa: E731
    elif name in {"BYTEA", "VARBINARY", "BYTES"}:
        convert = _bytes
    elif name in {"BOOLEAN", "BOOL"}:
        convert = lambda value: value in (True, "t", "true", 1)  # noqa: E731
    elif name in {"INTERVAL"}:
        convert = lambda value: value if isinstance(value, timedelta) else parse_interval(value)  # noqa: E731
    elif name in {"DOUBLE PRECISION", "FLOAT", "REAL", "DOUBLE"}:
        convert = float
    else:
        convert = lambda value: value  # noqa: E731
    return lambda value: None if value is None else convert(value)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        return bytes(value)
    if "\\" in value:
        raise ModelGap(f"the model database does not know the bytea {value!r}")
    return value.encode()


def items_of(value: Any) -> Iterable[Any]:
    """The items of an array, which may be written as text: '{}', '{1,NULL}'."""
    if not isinstance(value, str):
        return value  # type: ignore[no-any-return]
    if re.fullmatch(r"\{[^{}\"\\\s]*\}", value) is None:
        raise ModelGap(f"the model database does not know the array {value!r}")
    items = value[1:-1].split(",") if value != "{}" else []
    if "" in items:
        raise errors.InvalidTextRepresentation(f'malformed array literal: "{value}"')
    return [None if item.upper() == "NULL" else item for item in items]


_INTERVAL = re.compile(
    r"(-?[\d.]+)\s*(ms|millisecond|second|sec|s|minute|min|hour|day|week)s?", re.IGNORECASE
)
_UNITS = {
    "ms": 0.001,
    "mil": 0.001,
    "sec": 1,
    "s": 1,
    "min": 60,
    "hou": 3600,
    "day": 86400,
    "wee": 604800,
}


def parse_interval(text: str) -> timedelta:
    parts = _INTERVAL.findall(text)
    if not parts:
        raise ModelGap(f"the model database does not know the interval {text!r}")
    return timedelta(seconds=sum(float(n) * _UNITS[unit[:3].lower()] for n, unit in parts))


def _cast(node: exp.Expression) -> Compiled:
    assert isinstance(node, exp.Cast)
    inner, convert = compile_expression(node.this), caster(node.to.sql("postgres"))
    return lambda env: convert(inner(env))


def _interval(node: exp.Expression) -> Compiled:
    unit = node.args.get("unit")
    value = compile_expression(node.this)
    suffix = f" {unit.name}" if unit is not None else ""
    return lambda env: parse_interval(f"{value(env)}{suffix}")


def _coalesce(node: exp.Expression) -> Compiled:
    parts = [compile_expression(part) for part in (node.this, *node.expressions)]
    return lambda env: next((value for part in parts if (value := part(env)) is not None), None)


def _extreme(choose: Callable[[Iterable[Any]], Any]) -> Callable[[exp.Expression], Compiled]:
    def build(node: exp.Expression) -> Compiled:
        parts = [compile_expression(part) for part in (node.this, *node.expressions)]
        return lambda env: choose(value for part in parts if (value := part(env)) is not None)

    return build


def _tuple(node: exp.Expression) -> Compiled:
    parts = [compile_expression(part) for part in node.expressions]
    return lambda env: tuple(part(env) for part in parts)


def _array(node: exp.Expression) -> Compiled:
    parts = [compile_expression(part) for part in node.expressions]
    return lambda env: [part(env) for part in parts]


def _aggregate(combine: Callable[[list[Any]], Any]) -> Callable[[exp.Expression], Compiled]:
    def build(node: exp.Expression) -> Compiled:
        star = isinstance(node.this, exp.Star)
        distinct = isinstance(node.this, exp.Distinct)
        inner = (
            None
            if star
            else compile_expression(node.this.expressions[0] if distinct else node.this)
        )

        def run(env: Environment) -> Any:
            if env.group is None:
                raise ModelGap(f"aggregate outside a grouped query: {node.sql('postgres')}")
            values = [1 if inner is None else inner(env.scope(rows)) for rows in env.group]
            values = [value for value in values if value is not None]
            return combine(list(dict.fromkeys(values)) if distinct else values)

        return run

    return build


def _string_to_array(node: exp.Expression) -> Compiled:
    inner, separator = compile_expression(node.this), compile_expression(node.expression)

    def run(env: Environment) -> list[str] | None:
        text = inner(env)
        return None if text is None else text.split(separator(env)) if text else []

    return run


def _make_interval(node: exp.Expression) -> Compiled:
    parts = {
        str(kwarg.name): compile_expression(kwarg.expression)
        for kwarg in node.find_all(exp.Kwarg, exp.PropertyEQ)
    }
    names = {"secs": "seconds", "mins": "minutes"}
    return lambda env: timedelta(
        **{names.get(name, name): float(part(env)) for name, part in parts.items()}
    )


def _function(node: exp.Expression) -> Compiled:
    name = node.name.lower()
    arguments = [compile_expression(argument) for argument in node.expressions]
    if name in {"clock_timestamp", "now", "statement_timestamp", "transaction_timestamp"}:
        return lambda env: env.storage.clock()
    if name == "pg_current_xact_id":
        return lambda env: env.storage.xid(env.transaction)
    if name == "nextval":
        return lambda env: env.storage.next_value(str(arguments[0](env)))
    if name == "set_config":
        return lambda env: arguments[1](env)
    if name == "gen_random_uuid":  # which later releases of sqlglot know by itself
        return _uuid(node)
    raise ModelGap(f"the model database does not know the function {name}()")


def _defined_function(node: exp.Expression) -> Compiled:
    """A call of what the schema defines: `outbox.count_busy_key(...)`."""
    name, call = f"{node.this.name}.{node.expression.name.lower()}", node.expression
    if not isinstance(node.this, exp.Identifier) or not isinstance(call, exp.Anonymous):
        raise ModelGap(f"the model database does not know {node.sql('postgres')}")
    arguments = [compile_expression(argument) for argument in call.expressions]

    def run(env: Environment) -> Any:
        known = [*env.storage.functions.get(name, {}).values()]
        if len(known) != 1 or known[0] is None:
            raise ModelGap(f"the model database does not know the function {name}()")
        values = [argument(env) for argument in arguments]
        return known[0](env.storage, env.transaction, values)

    return run


def _position(node: exp.Expression) -> Compiled:
    text, part = compile_expression(node.this), compile_expression(node.args["substr"])

    def run(env: Environment) -> int | None:
        a, b = alike(text(env), part(env))
        return None if a is None or b is None else a.find(b) + 1

    return run


def _uuid(_: exp.Expression) -> Compiled:
    return lambda env: UUID(int=env.storage.next_value("gen_random_uuid"))


_BUILDERS: dict[type[exp.Expression], Callable[[exp.Expression], Compiled]] = {
    exp.Column: _column,
    exp.Placeholder: _placeholder,
    exp.Literal: _literal,
    exp.Boolean: lambda node: lambda _: bool(node.this),
    exp.Null: lambda _: lambda _: None,
    exp.Paren: lambda node: compile_expression(node.this),
    exp.Alias: lambda node: compile_expression(node.this),
    exp.Neg: lambda node: (lambda inner: lambda env: -inner(env))(compile_expression(node.this)),
    exp.Not: _not,
    exp.And: _and,
    exp.Or: _or,
    exp.EQ: _comparison(operator.eq),
    exp.NEQ: _comparison(operator.ne),
    exp.GT: _comparison(operator.gt),
    exp.GTE: _comparison(operator.ge),
    exp.LT: _comparison(operator.lt),
    exp.LTE: _comparison(operator.le),
    exp.Is: _is,
    exp.In: _in,
    exp.Between: _between,
    exp.Exists: _exists,
    exp.Add: _arithmetic(operator.add),
    exp.Sub: _arithmetic(operator.sub),
    exp.Mul: _arithmetic(operator.mul),
    exp.Div: _arithmetic(_divide),
    exp.Mod: _arithmetic(operator.mod),
    exp.Pow: _arithmetic(operator.pow),
    exp.DPipe: _arithmetic(lambda a, b: f"{a}{b}"),
    exp.Case: _case,
    exp.Cast: _cast,
    exp.Interval: _interval,
    exp.Coalesce: _coalesce,
    exp.Greatest: _extreme(max),
    exp.Least: _extreme(min),
    exp.Tuple: _tuple,
    exp.Array: _array,
    exp.Subquery: _scalar_subquery,
    exp.Select: _scalar_subquery,
    exp.CurrentTimestamp: lambda _: lambda env: env.storage.clock(),
    exp.MakeInterval: _make_interval,
    exp.StringToArray: _string_to_array,
    exp.Lower: lambda node: (lambda inner: lambda env: str(inner(env)).lower())(
        compile_expression(node.this)
    ),
    exp.Upper: lambda node: (lambda inner: lambda env: str(inner(env)).upper())(
        compile_expression(node.this)
    ),
    exp.Count: _aggregate(len),
    exp.Sum: _aggregate(lambda values: sum(values) if values else None),
    exp.Max: _aggregate(lambda values: max(values, default=None)),
    exp.Min: _aggregate(lambda values: min(values, default=None)),
    exp.LogicalOr: _aggregate(lambda values: any(values) if values else None),
    exp.LogicalAnd: _aggregate(lambda values: all(values) if values else None),
    exp.Anonymous: _function,
    exp.Dot: _defined_function,
    exp.StrPosition: _position,
    exp.Uuid: _uuid,
}
