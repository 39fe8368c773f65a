"""Rows, row locks and transactions as PostgreSQL has them under READ COMMITTED, in one thread.

A row has at most two versions, the committed one and the one that its lock's owner has written: under READ COMMITTED a
statement sees the newest committed version and its own transaction's writes, and nobody writes a row without its lock.
Whoever needs a lock or a unique key that another transaction holds waits for that transaction's end, through a callback
that the scheduler gives; a circle of waiting is a deadlock, and the one who closes it gets the error.

`tests/simulation/test_model_database.py` runs the same two-session scripts here and on PostgreSQL.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Final

from psycopg import OperationalError, errors

Values = dict[str, Any]


class _Deleted:
    def __repr__(self) -> str:
        return "DELETED"


DELETED: Final = _Deleted()


@dataclass(eq=False)
class Row:
    """One row: what is committed, and what the owner of its lock has made of it."""

    number: int
    committed: Values | None = None
    written: Values | _Deleted | None = None
    owner: Transaction | None = None

    def seen_by(self, transaction: Transaction) -> Values | None:
        """The version that a statement of *transaction* sees, or None."""
        if self.owner is transaction and self.written is not None:
            return None if isinstance(self.written, _Deleted) else self.written
        return self.committed

    def newest(self) -> Iterator[Values]:
        """Every version that could come to be: a unique key looks at all of them."""
        if self.committed is not None:
            yield self.committed
        if self.written is not None and not isinstance(self.written, _Deleted):
            yield self.written


@dataclass
class Column:
    name: str
    cast: Callable[[Any], Any]
    default: Callable[[Any], Any] | None = None
    """Called with the environment of the statement."""
    not_null: bool = False


@dataclass
class Table:
    name: str
    columns: dict[str, Column]
    unique: list[tuple[str, ...]]
    """Column names of the primary key and of each unique constraint."""
    checks: list[Callable[[Values], bool | None]] = field(default_factory=list)
    references: list[tuple[tuple[str, ...], str, tuple[str, ...], bool]] = field(
        default_factory=list
    )
    """Foreign keys: own columns, table, its columns, whether deletion cascades."""
    rows: dict[int, Row] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def with_key(self, columns: tuple[str, ...], values: Values) -> list[Row]:
        """Rows of which some version has the same key as *values*; a key with a NULL equals none."""
        key = [values[name] for name in columns]
        if None in key:
            return []
        return [
            row
            for row in self.rows.values()
            if any([version[name] for name in columns] == key for version in row.newest())
        ]


@dataclass(eq=False)
class Transaction:
    """One transaction: the rows it holds, in the order it took them, so that savepoints can give them back."""

    number: int
    xid: int | None = None
    ended: bool = False
    log: list[tuple[Table, Row, Values | _Deleted | None, Transaction | None]] = field(
        default_factory=list
    )
    savepoints: list[tuple[str, int]] = field(default_factory=list)
    waits_for: Transaction | None = None


Wait = Callable[[Transaction, Callable[[], bool]], None]
Function = Callable[["Storage", Transaction, Sequence[Any]], Any]
"""What a call comes to, in a transaction, with its arguments."""


class Storage:
    """The tables of one database and the transactions open on them.

    *wait(waiter, blocked)* is called when *waiter* needs what another transaction has; it returns once `blocked()` is
    false, which the end of that transaction, or its return to a savepoint, brings about.
    """

    def __init__(self, wait: Wait, clock: Callable[[], Any]) -> None:
        self.tables: dict[str, Table] = {}
        self.sequences: dict[str, Iterator[int]] = {}
        self.functions: dict[str, dict[str, Function | None]] = {}
        """By name and by the types of its parameters; None for one that the model does not know."""
        self.clock = clock
        self.wait = wait
        self.commits = 0
        """How often what is committed has changed."""
        self._transactions = itertools.count(1)
        self._xids = itertools.count(1000)

    def copy_from(self, template: Storage) -> None:
        """Begin as *template* stands, with no transaction open: a fresh database for another run."""
        self.commits += 1
        for name, table in template.tables.items():
            rows = {number: Row(number, row.committed) for number, row in table.rows.items()}
            self.tables[name] = replace(
                table, rows=rows, numbers=itertools.count(max(rows, default=-1) + 1)
            )
        self.functions = dict(template.functions)
        self.sequences = {name: copy(sequence) for name, sequence in template.sequences.items()}

    def begin(self) -> Transaction:
        return Transaction(next(self._transactions))

    def xid(self, transaction: Transaction) -> int:
        if transaction.xid is None:
            transaction.xid = next(self._xids)
        return transaction.xid

    def next_value(self, sequence: str) -> int:
        return next(self.sequences.setdefault(sequence, itertools.count(1)))

    # --- locks

    def lock(
        self,
        table: Table,
        row: Row,
        transaction: Transaction,
        *,
        or_skip: bool = False,
        or_fail: bool = False,
    ) -> bool:
        """Take the row's lock, waiting for whoever has it. False only with *or_skip* where it is taken."""
        while row.owner is not None and row.owner is not transaction:
            if or_skip:
                return False
            if or_fail:
                raise errors.LockNotAvailable(
                    f'could not obtain lock on row in relation "{table.name}"'
                )
            self._wait_for(transaction, row)
        if row.owner is None:
            transaction.log.append((table, row, row.written, None))
            row.owner = transaction
        return True

    def _wait_for(self, waiter: Transaction, row: Row) -> None:
        holder = at = row.owner
        while at is not None:
            if at is waiter:
                raise errors.DeadlockDetected("deadlock detected")
            at = at.waits_for
        waiter.waits_for = holder
        try:
            self.wait(waiter, lambda: row.owner is holder)
        finally:
            waiter.waits_for = None
        if waiter.ended:
            raise OperationalError("the connection was lost while the statement waited")

    # --- writes

    def insert(self, table: Table, values: Values, transaction: Transaction) -> Row:
        """Add a row. The caller has looked for conflicts (`conflict`)."""
        self.xid(transaction)
        self._check(table, values)
        row = Row(next(table.numbers), written=values, owner=transaction)
        table.rows[row.number] = row
        transaction.log.append((table, row, None, None))
        return row

    def write(
        self, table: Table, row: Row, values: Values | _Deleted, transaction: Transaction
    ) -> None:
        """Update or delete a row whose lock the transaction has."""
        self.xid(transaction)
        if isinstance(values, dict):
            self._check(table, values)
        transaction.log.append((table, row, row.written, transaction))
        row.written = values

    def conflict(
        self, table: Table, values: Values, transaction: Transaction, *, of: Row | None = None
    ) -> tuple[Row, tuple[str, ...]] | None:
        """The row that has one of the unique keys of *values*, waiting until it is known whether it stays."""
        for columns in table.unique:
            while rows := [row for row in table.with_key(columns, values) if row is not of]:
                row = rows[0]
                if row.owner is None or row.owner is transaction:
                    seen = row.seen_by(transaction)
                    if seen is not None and all(seen[name] == values[name] for name in columns):
                        return row, columns
                    break
                if row.committed is not None and row.written is None:
                    return row, columns
                self._wait_for(transaction, row)
        return None

    def _check(self, table: Table, values: Values) -> None:
        for column in table.columns.values():
            if column.not_null and values[column.name] is None:
                raise errors.NotNullViolation(
                    f'null value in column "{column.name}" of relation "{table.name}" violates not-null constraint'
                )
        for check in table.checks:
            if check(values) is False:
                raise errors.CheckViolation(
                    f'new row for relation "{table.name}" violates check constraint'
                )

    # --- ends

    def commit(self, transaction: Transaction) -> None:
        self.commits += 1
        for table, row in self._held(transaction):
            if isinstance(row.written, _Deleted):
                table.rows.pop(row.number, None)
                row.committed = None
            elif row.written is not None:
                row.committed = row.written
            row.written = row.owner = None
        self._end(transaction)

    def rollback(self, transaction: Transaction) -> None:
        self._undo_to(transaction, 0)
        self._end(transaction)

    def savepoint(self, transaction: Transaction, name: str) -> None:
        transaction.savepoints.append((name, len(transaction.log)))

    def release(self, transaction: Transaction, name: str) -> None:
        del transaction.savepoints[self._savepoint(transaction, name) :]

    def rollback_to(self, transaction: Transaction, name: str) -> None:
        at = self._savepoint(transaction, name)
        self._undo_to(transaction, transaction.savepoints[at][1])
        del transaction.savepoints[at + 1 :]

    def fail(self, transaction: Transaction) -> None:
        """An error undoes at once, and unlocks, what was done since the innermost savepoint."""
        self._undo_to(transaction, transaction.savepoints[-1][1] if transaction.savepoints else 0)

    def _savepoint(self, transaction: Transaction, name: str) -> int:
        for at in reversed(range(len(transaction.savepoints))):
            if transaction.savepoints[at][0] == name:
                return at
        raise errors.InvalidSavepointSpecification(f'savepoint "{name}" does not exist')

    def _undo_to(self, transaction: Transaction, length: int) -> None:
        while len(transaction.log) > length:
            table, row, written, owner = transaction.log.pop()
            row.written, row.owner = written, owner
            if row.committed is None and written is None:
                table.rows.pop(row.number, None)

    def _end(self, transaction: Transaction) -> None:
        transaction.log.clear()
        transaction.savepoints.clear()
        transaction.ended = True

    @staticmethod
    def _held(transaction: Transaction) -> Iterable[tuple[Table, Row]]:
        seen: set[int] = set()
        for table, row, _, _ in transaction.log:
            if id(row) not in seen:
                seen.add(id(row))
                yield table, row
