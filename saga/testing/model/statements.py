"""SELECT, INSERT, UPDATE and DELETE on the model's rows, with the waits that PostgreSQL has under READ COMMITTED.

A statement takes its rows as they are when it begins. Where it must lock one and finds it changed after the wait, it
looks again at the new version only (PostgreSQL's EvalPlanQual): a row that no longer fits is left out, and rows that
began to fit meanwhile are not seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import errors
from sqlglot import exp

from saga.testing.model.expressions import Compiled, Environment, ModelGap, compile_expression
from saga.testing.model.storage import DELETED, Row, Storage, Table, Values


@dataclass
class Result:
    columns: list[str]
    rows: list[tuple[Any, ...]]
    count: int


def table_name(node: exp.Table) -> str:
    return f"{node.db or 'public'}.{node.name}"


def execute(node: exp.Expression, env: Environment) -> Result:
    """Run one statement in the environment's transaction."""
    env.run_query = lambda query, inner: select(query, inner).rows
    env.tables = dict(env.tables)
    with_clause = node.args.get("with_") or node.args.get("with")
    for cte in with_clause.expressions if with_clause else ():
        result = execute(cte.this, env)
        names = [column.name for column in cte.args["alias"].columns] or result.columns
        env.tables[cte.alias] = [dict(zip(names, row, strict=True)) for row in result.rows]
    if isinstance(node, exp.Select | exp.SetOperation | exp.Subquery | exp.Values):
        return select(node, env)
    if isinstance(node, exp.Insert):
        return _insert(node, env)
    if isinstance(node, exp.Update):
        return _update(node, env)
    if isinstance(node, exp.Delete):
        return _delete(node, env)
    raise ModelGap(
        f"the model database does not know {type(node).__name__}: {node.sql('postgres')}"
    )


_COMPILED: dict[int, Compiled] = {}
_GROUPED: dict[int, bool] = {}
_NAMES: dict[int, list[str]] = {}
# Parsed statements are kept for ever by the driver's cache, so a node's identity is stable.


def _compiled(node: exp.Expression) -> Compiled:
    found = _COMPILED.get(id(node))
    if found is None:
        found = _COMPILED[id(node)] = compile_expression(node)
    return found


def _is_grouped(node: exp.Select) -> bool:
    found = _GROUPED.get(id(node))
    if found is None:
        aggregates = any(
            one.find_ancestor(exp.Select) is node
            for item in node.expressions
            for one in item.find_all(exp.AggFunc)
        )
        found = _GROUPED[id(node)] = aggregates or node.args.get("group") is not None
    return found


def _table(env: Environment, node: exp.Table) -> Table:
    try:
        return env.storage.tables[table_name(node)]
    except KeyError:
        raise errors.UndefinedTable(f'relation "{table_name(node)}" does not exist') from None


# --- reading

Scope = dict[str, Mapping[str, Any] | None]
Found = tuple[Scope, dict[str, tuple[Table, Row]]]
"""One combination of rows: their values by alias, and where they are stored, for locking."""


def _source(node: exp.Expression, env: Environment) -> list[Found]:
    alias = node.alias_or_name
    if isinstance(node, exp.Table):
        if not node.db and node.name in env.tables:
            return [({alias: row}, {}) for row in env.tables[node.name]]
        table = _table(env, node)
        return [
            ({alias: values}, {alias: (table, row)})
            for row in list(table.rows.values())
            if (values := row.seen_by(env.transaction)) is not None
        ]
    if isinstance(node, exp.Subquery):
        result = select(node.this, env)
        return [({alias: dict(zip(result.columns, row, strict=True))}, {}) for row in result.rows]
    if isinstance(node, exp.Unnest):
        lists = [_compiled(argument)(env) for argument in node.expressions]
        given = node.args.get("alias")
        names = [column.name for column in given.columns] if given is not None else []
        names = names or [f"unnest{at or ''}" for at in range(len(lists))]
        return [
            ({alias: dict(zip(names, row, strict=True))}, {})
            for row in itertools.zip_longest(*lists)
        ]
    raise ModelGap(f"the model database cannot read from {node.sql('postgres')}")


def _from(node: exp.Expression, env: Environment) -> list[Found]:
    clause = node.args.get("from_") or node.args.get("from")
    using = node.args.get("using")
    first = using[0] if using else clause.this if clause is not None else None
    if first is None:
        return [({}, {})]
    found = _source(first, env)
    for join in node.args.get("joins") or ():
        found = _join(found, join, env)
    return found


def _join(left: list[Found], join: exp.Join, env: Environment) -> list[Found]:
    right = _source(join.this, env)
    on = join.args.get("on")
    condition = None if on is None else _compiled(on)
    joined: list[Found] = []
    for left_scope, left_rows in left:
        matches = [
            ({**left_scope, **scope}, {**left_rows, **rows})
            for scope, rows in right
            if condition is None or condition(env.scope({**left_scope, **scope})) is True
        ]
        if not matches and join.side == "LEFT":
            matches = [({**left_scope, join.this.alias_or_name: None}, left_rows)]
        joined += matches
    return joined


def _fits(node: exp.Expression, env: Environment) -> Callable[[Scope], bool]:
    where = node.args.get("where")
    if where is None:
        return lambda _: True
    condition = _compiled(where.this)
    return lambda scope: condition(env.scope(scope)) is True


def select(node: exp.Expression, env: Environment) -> Result:
    if isinstance(node, exp.Subquery):
        return select(node.this, env)
    if isinstance(node, exp.Union):
        left, right = (select(side, env) for side in (node.this, node.expression))
        rows = left.rows + right.rows
        return Result(
            left.columns,
            list(dict.fromkeys(rows)) if node.args.get("distinct") else rows,
            len(rows),
        )
    if isinstance(node, exp.Values):
        rows = [tuple(_compiled(item)(env) for item in row.expressions) for row in node.expressions]
        return Result([f"column{at + 1}" for at in range(len(rows[0]))], rows, len(rows))
    assert isinstance(node, exp.Select), node
    if node.args.get("with_") is not None and node.args["with_"].parent is node and not env.tables:
        return execute(node, env)
    fits = _fits(node, env)
    found = [one for one in _from(node, env) if fits(one[0])]
    if _is_grouped(node):
        return _grouped(node, env, [scope for scope, _ in found])
    found = _ordered(node, env, found)
    locks = node.args.get("locks")
    if locks:
        found = list(_locked(node, locks[0], env, found, fits))
    found = found[_slice(node, env)] if not locks else found
    return _projected(node, env, [env.scope(scope) for scope, _ in found])


def _slice(node: exp.Expression, env: Environment) -> slice:
    limit, offset = node.args.get("limit"), node.args.get("offset")
    start = 0 if offset is None else _compiled(offset.expression)(env)
    count = None if limit is None else _compiled(limit.expression)(env)
    return slice(start, None if count is None else start + count)


def _ordered(node: exp.Expression, env: Environment, found: list[Found]) -> list[Found]:
    order = node.args.get("order")
    for term in reversed(order.expressions if order else ()):
        key = _compiled(term.this)
        descending = bool(term.args.get("desc"))

        def sort_key(one: Found, key: Compiled = key) -> tuple[bool, Any]:
            value = key(env.scope(one[0]))
            return ((value is None), 0 if value is None else value)

        found = sorted(found, key=sort_key, reverse=descending)
    return found


def _locked(
    node: exp.Expression,
    lock: exp.Lock,
    env: Environment,
    found: list[Found],
    fits: Callable[[Scope], bool],
) -> Iterator[Found]:
    wait = lock.args.get("wait")
    or_skip, or_fail = wait is False, wait is True
    named = [item.name for item in lock.expressions]
    limit = _slice(node, env).stop
    taken = 0
    for scope, rows in found:
        if limit is not None and taken >= limit:
            return
        for alias, (table, row) in rows.items():
            if named and alias not in named:
                continue
            if not env.storage.lock(table, row, env.transaction, or_skip=or_skip, or_fail=or_fail):
                break
            scope = {**scope, alias: row.seen_by(env.transaction)}
        else:
            if all(scope[alias] is not None for alias in rows) and fits(scope):
                taken += 1
                yield scope, rows


def _names(node: exp.Select | exp.Returning) -> list[str]:
    found = _NAMES.get(id(node))
    if found is None:
        found = _NAMES[id(node)] = [item.alias_or_name or item.key for item in node.expressions]
    return found


def _projected(node: Any, env: Environment, scopes: list[Environment]) -> Result:
    columns: list[str] = []
    readers: list[Callable[[Environment], list[Any]]] = []
    for item, name in zip(node.expressions, _names(node), strict=True):
        if item.is_star:
            alias = item.table if isinstance(item, exp.Column) else ""
            names = _star_names(node, env, scopes, alias)
            columns += [column for _, column in names]
            readers.append(_star_reader(names))
        else:
            columns.append(name)
            readers.append(_reader(_compiled(item)))
    rows = [tuple(value for read in readers for value in read(at)) for at in scopes]
    if node.args.get("distinct"):
        rows = list(dict.fromkeys(rows))
    return Result(columns, rows, len(rows))


def _reader(compiled: Compiled) -> Callable[[Environment], list[Any]]:
    return lambda at: [compiled(at)]


def _star_reader(names: list[tuple[str, str]]) -> Callable[[Environment], list[Any]]:
    return lambda at: [(at.rows[table] or {}).get(column) for table, column in names]


def _star_names(
    node: Any, env: Environment, scopes: list[Environment], alias: str
) -> list[tuple[str, str]]:
    if scopes:
        return [
            (table, column)
            for table, row in scopes[0].rows.items()
            if table not in env.rows and alias in ("", table)
            for column in (row or {})
        ]
    clause = node.args.get("from_") or node.args.get("from")
    source = clause.this if clause is not None else None
    if isinstance(source, exp.Table) and table_name(source) in env.storage.tables:
        return [
            (source.alias_or_name, name) for name in env.storage.tables[table_name(source)].columns
        ]
    return []


def _grouped(node: exp.Select, env: Environment, scopes: list[Scope]) -> Result:
    group = node.args.get("group")
    keys = [_compiled(key) for key in (group.expressions if group else ())]
    groups: dict[tuple[Any, ...], list[Scope]] = {} if keys else {(): []}
    for scope in scopes:
        groups.setdefault(tuple(key(env.scope(scope)) for key in keys), []).append(scope)
    environments = []
    for members in groups.values():
        at = env.scope(members[0] if members else {})
        at.group = members
        environments.append(at)
    having = node.args.get("having")
    if having is not None:
        environments = [at for at in environments if _compiled(having.this)(at) is True]
    result = _projected(node, env, environments)
    order = node.args.get("order")
    if order is not None:
        pairs = list(zip(environments, result.rows, strict=True))
        for term in reversed(order.expressions):
            key = _compiled(term.this)
            pairs.sort(key=lambda pair: key(pair[0]), reverse=bool(term.args.get("desc")))
        result.rows = [row for _, row in pairs]
    return result


# --- writing


def _returned(node: exp.Expression, env: Environment, written: list[Scope]) -> Result:
    returning = node.args.get("returning")
    if returning is None:
        return Result([], [], len(written))
    result = _projected(returning, env, [env.scope(scope) for scope in written])
    return Result(result.columns, result.rows, len(written))


def _insert(node: exp.Insert, env: Environment) -> Result:
    schema = node.this
    target = schema.this if isinstance(schema, exp.Schema) else schema
    table = _table(env, target)
    names = (
        [column.name for column in schema.expressions]
        if isinstance(schema, exp.Schema)
        else list(table.columns)
    )
    source = node.args.get("expression")
    if source is None:
        given: list[dict[str, Any]] = [{}]
    elif isinstance(source, exp.Values):
        given = [_row_of_values(names, row.expressions, env) for row in source.expressions]
    else:
        given = [dict(zip(names, row, strict=False)) for row in select(source, env).rows]
    alias = target.alias or target.name
    written = [
        scope for one in given if (scope := _insert_row(node, env, table, alias, one)) is not None
    ]
    return _returned(node, env, written)


def _row_of_values(
    names: list[str], items: list[exp.Expression], env: Environment
) -> dict[str, Any]:
    return {
        name: _compiled(item)(env)
        for name, item in zip(names, items, strict=False)
        if not (isinstance(item, exp.Var | exp.Column) and item.name.upper() == "DEFAULT")
    }


def _insert_row(
    node: exp.Insert, env: Environment, table: Table, alias: str, given: dict[str, Any]
) -> Scope | None:
    values = _with_defaults(table, given, env)
    conflict = node.args.get("conflict")
    while (met := env.storage.conflict(table, values, env.transaction)) is not None:
        row, key = met
        if conflict is None:
            raise errors.UniqueViolation(
                f'duplicate key value violates unique constraint on {", ".join(key)} of "{table.name}"'
            )
        if not conflict.expressions:
            return None
        updated = _update_on_conflict(conflict, env, table, alias, row, values)
        if updated is not _GONE:
            return updated
    _check_references(env.storage, table, values, env)
    env.storage.insert(table, values, env.transaction)
    return {alias: values}


_GONE: Any = object()


def _update_on_conflict(
    conflict: exp.OnConflict, env: Environment, table: Table, alias: str, row: Row, values: Values
) -> Scope | None:
    env.storage.lock(table, row, env.transaction)
    current = row.seen_by(env.transaction)
    if current is None:
        return _GONE  # type: ignore[no-any-return]
    scope = env.scope({alias: current, "excluded": values})
    where = conflict.args.get("where")
    if where is not None and _compiled(where.this)(scope) is not True:
        return None
    return {
        alias: _write_assignments(
            conflict.expressions, env.storage, table, row, current, scope, env
        )
    }


def _with_defaults(table: Table, given: dict[str, Any], env: Environment) -> Values:
    values: Values = {}
    for name, column in table.columns.items():
        if name in given:
            values[name] = column.cast(given[name])
        else:
            values[name] = None if column.default is None else column.cast(column.default(env))
    return values


def _check_references(storage: Storage, table: Table, values: Values, env: Environment) -> None:
    for own, other, columns, _ in table.references:
        key = [values[name] for name in own]
        if None in key:
            continue
        seen = (row.seen_by(env.transaction) for row in storage.tables[other].rows.values())
        if not any(
            found is not None and [found[name] for name in columns] == key for found in seen
        ):
            raise errors.ForeignKeyViolation(
                f'insert or update on table "{table.name}" violates foreign key constraint'
            )


def _write_assignments(
    assignments: list[exp.Expression], storage: Storage, table: Table, row: Row, current: Values,
    scope: Environment, env: Environment,
) -> Values:  # fmt: skip
    changed = dict(current)
    for assignment in assignments:
        name = assignment.this.name
        changed[name] = table.columns[name].cast(_compiled(assignment.expression)(scope))
    met = storage.conflict(table, changed, env.transaction, of=row)
    if met is not None:
        raise errors.UniqueViolation(
            f'duplicate key value violates unique constraint of "{table.name}"'
        )
    storage.write(table, row, changed, env.transaction)
    return changed


def _targets(node: exp.Expression, env: Environment) -> Iterator[tuple[Table, Row, Scope]]:
    """The rows that an UPDATE or DELETE touches, each locked and looked at again if it changed meanwhile."""
    target = node.this
    table, alias = _table(env, target), target.alias_or_name
    fits = _fits(node, env)
    others = _from(node, env)
    seen = [(row, row.seen_by(env.transaction)) for row in list(table.rows.values())]
    chosen = [
        (row, scope)
        for row, values in seen
        if values is not None
        for scope, _ in others[:]
        if fits({alias: values, **scope})
    ]
    done: set[int] = set()
    for row, scope in chosen:
        if row.number in done:
            continue
        env.storage.lock(table, row, env.transaction)
        current = row.seen_by(env.transaction)
        if current is None or not fits({alias: current, **scope}):
            continue
        done.add(row.number)
        yield table, row, {alias: current, **scope}


def _update(node: exp.Update, env: Environment) -> Result:
    alias = node.this.alias_or_name
    written: list[Scope] = []
    for table, row, scope in _targets(node, env):
        current = row.seen_by(env.transaction)
        assert current is not None
        changed = _write_assignments(
            node.expressions, env.storage, table, row, current, env.scope(scope), env
        )
        written.append({**scope, alias: changed})
    return _returned(node, env, written)


def _delete(node: exp.Delete, env: Environment) -> Result:
    written: list[Scope] = []
    for table, row, scope in _targets(node, env):
        env.storage.write(table, row, DELETED, env.transaction)
        _cascade(env, table, dict(scope[node.this.alias_or_name] or {}))
        written.append(scope)
    return _returned(node, env, written)


def _cascade(env: Environment, table: Table, gone: Values) -> None:
    for child in env.storage.tables.values():
        for own, other, columns, cascades in child.references:
            if env.storage.tables.get(other) is not table or not cascades:
                continue
            for row in list(child.rows.values()):
                values = row.seen_by(env.transaction)
                if values is not None and [values[n] for n in own] == [gone[n] for n in columns]:
                    env.storage.lock(child, row, env.transaction)
                    env.storage.write(child, row, DELETED, env.transaction)
