"""CREATE TABLE and its kin: what the model needs of them, which is columns, defaults, keys and checks."""

from __future__ import annotations

from collections.abc import Callable

from psycopg import errors
from sqlglot import exp

from saga.testing.model.expressions import (
    Compiled,
    Environment,
    ModelGap,
    caster,
    compile_expression,
)
from saga.testing.model.statements import table_name
from saga.testing.model.storage import Column, Storage, Table, Transaction, Values

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
    else:
        raise ModelGap(f"the model database does not know {node.sql('postgres')}")


def alter_nullability(node: exp.Expression, storage: Storage, transaction: Transaction) -> None:
    """Carry out an ALTER TABLE that says of columns whether they may be NULL."""
    assert isinstance(node, exp.Alter), node
    table = storage.tables.get(table_name(node.this))
    if table is None:
        if node.args.get("exists"):
            return
        raise errors.UndefinedTable(f'relation "{table_name(node.this)}" does not exist')
    for action in node.args["actions"]:
        if not isinstance(action, exp.AlterColumn) or "allow_null" not in action.args:
            raise ModelGap(f"the model database does not know {node.sql('postgres')}")
        if action.name not in table.columns:
            raise errors.UndefinedColumn(
                f'column "{action.name}" of relation "{table.name}" does not exist'
            )
        allows_null = bool(action.args["allow_null"])
        if not allows_null:
            _refuse_nulls(table, action.name, transaction)
        table.columns[action.name].not_null = not allows_null


def _refuse_nulls(table: Table, column: str, transaction: Transaction) -> None:
    for row in table.rows.values():
        if row.owner not in (None, transaction):
            raise ModelGap(f"the model database does not wait to alter {table.name}")
        values = row.seen_by(transaction)
        if values is not None and values[column] is None:
            raise errors.NotNullViolation(
                f'column "{column}" of relation "{table.name}" contains null values'
            )


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
