"""CREATE TABLE and its kin: what the model needs of them, which is columns, defaults, keys and checks."""

from __future__ import annotations

from collections.abc import Callable

from sqlglot import exp

from saga.testing.model.expressions import (
    Compiled,
    Environment,
    ModelGap,
    caster,
    compile_expression,
)
from saga.testing.model.statements import table_name
from saga.testing.model.storage import Column, Storage, Table, Values

_SERIAL = {"SERIAL", "BIGSERIAL", "SMALLSERIAL"}


def define(node: exp.Expression, storage: Storage) -> None:
    """Carry out one statement of data definition. Partitions, plain indexes, schemas and grants mean nothing here."""
    if isinstance(node, exp.Create):
        if node.kind == "TABLE" and isinstance(node.this, exp.Schema):
            _create_table(node, storage)
        elif node.kind == "INDEX" and node.args.get("unique"):
            _create_unique_index(node, storage)
    elif isinstance(node, exp.Drop):
        if node.kind == "TABLE":
            storage.tables.pop(table_name(node.this), None)
    elif isinstance(node, exp.Alter):
        for action in node.args["actions"]:
            if isinstance(action, exp.AlterColumn) and "allow_null" in action.args:
                column = storage.tables[table_name(node.this)].columns[action.name]
                column.not_null = not action.args["allow_null"]
    else:
        raise ModelGap(f"the model database does not know {node.sql('postgres')}")


def _create_table(node: exp.Create, storage: Storage) -> None:
    name = table_name(node.this.this)
    table = Table(name=name, columns={}, unique=[])
    for part in node.this.expressions:
        if isinstance(part, exp.ColumnDef):
            _add_column(table, part, storage)
        else:
            _add_constraint(
                table, part.expressions[0] if isinstance(part, exp.Constraint) else part, storage
            )
    if name not in storage.tables:
        storage.tables[name] = table


def _create_unique_index(node: exp.Create, storage: Storage) -> None:
    index = node.this
    table = storage.tables[table_name(index.args["table"])]
    if index.find(exp.Where) is None:
        columns = index.args["params"].args["columns"]
        table.unique.append(
            tuple(
                column.this.name if isinstance(column, exp.Ordered) else column.name
                for column in columns
            )
        )


def _add_column(table: Table, node: exp.ColumnDef, storage: Storage) -> None:
    name, kind = node.name, node.kind.sql("postgres") if node.kind is not None else "TEXT"
    column = Column(name, caster("BIGINT" if kind in _SERIAL else kind))
    if kind in _SERIAL:
        column.default = _from_sequence(f"{table.name}_{name}_seq")
        column.not_null = True
    for constraint in node.constraints:
        what = constraint.kind
        if isinstance(what, exp.NotNullColumnConstraint):
            column.not_null = not what.args.get("allow_null")
        elif isinstance(what, exp.DefaultColumnConstraint):
            column.default = compile_expression(what.this)
        elif isinstance(what, exp.GeneratedAsIdentityColumnConstraint):
            column.default = _from_sequence(f"{table.name}_{name}_seq")
        elif isinstance(what, exp.PrimaryKeyColumnConstraint):
            column.not_null = True
            table.unique.append((name,))
        elif isinstance(what, exp.UniqueColumnConstraint):
            table.unique.append((name,))
        elif isinstance(what, exp.CheckColumnConstraint):
            table.checks.append(_check(table, what.this, storage))
        elif isinstance(what, exp.Reference):
            table.references.append(_reference((name,), what, storage))
    table.columns[name] = column


def _from_sequence(name: str) -> Compiled:
    return lambda env: env.storage.next_value(name)


def _add_constraint(table: Table, node: exp.Expression, storage: Storage) -> None:
    if isinstance(node, exp.PrimaryKey):
        columns = tuple(column.name for column in node.expressions)
        table.unique.insert(0, columns)
        for name in columns:
            table.columns[name].not_null = True
    elif isinstance(node, exp.UniqueColumnConstraint):
        table.unique.append(tuple(column.name for column in node.this.expressions))
    elif isinstance(node, exp.CheckColumnConstraint):
        table.checks.append(_check(table, node.this, storage))
    elif isinstance(node, exp.ForeignKey):
        own = tuple(column.name for column in node.expressions)
        table.references.append(_reference(own, node.args["reference"], storage))
    else:
        raise ModelGap(f"the model database does not know the constraint {node.sql('postgres')}")


def _check(
    table: Table, condition: exp.Expression, storage: Storage
) -> Callable[[Values], bool | None]:
    compiled = compile_expression(condition)
    alias = table.name.split(".")[1]

    def holds(values: Values) -> bool | None:
        env = Environment(storage, None, {}, {alias: values})  # type: ignore[arg-type]
        return compiled(env)  # type: ignore[no-any-return]

    return holds


def _reference(
    own: tuple[str, ...], node: exp.Expression, storage: Storage
) -> tuple[tuple[str, ...], str, tuple[str, ...], bool]:
    target = node.this
    named = target.expressions if isinstance(target, exp.Schema) else []
    other = table_name(target.this if isinstance(target, exp.Schema) else target)
    columns = tuple(column.name for column in named) or storage.tables[other].unique[0]
    cascades = any("CASCADE" in str(option).upper() for option in node.args.get("options") or ())
    return own, other, columns, cascades
