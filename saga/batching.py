"""The journal of a batch: what several deliveries in one transaction read and write, at once.

Before the first handler of a batch runs, one statement locks the rows of all its sagas, adding those
that are missing, and one reads where their runs stand. The runs that the batch makes are written
with one statement just before its commit.

Why it reads what each statement by itself would have read: all that is remembered here is written
only by who holds the saga's lock. The second statement begins after the first has all locks, so it
sees all that earlier holders wrote; from then on until the commit this transaction is the holder,
and its own writes go through `BatchJournal`, which remembers them. What is not remembered (another
transaction added the row in that very moment, or a handler turns to a saga that its event does not
name) is asked for one by one. Rows are locked in the order of their ids, which is the order in which
handlers run, so two batches do not wait for each other in a circle.

Why no run is lost: those not written yet are written before any statement here that reads runs or
changes one, and before the commit, never inside a savepoint: a rollback to that takes none along.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.orm import Session

from outbox.connections import executor
from outbox.sql import in_schema
from saga.context import Emission
from saga.journal import (
    ClaimedRun,
    RunKey,
    SagaRow,
    SagaState,
    StepRow,
    StepState,
    check_step_move,
)
from saga.store import SqlJournal, written

_LOCK_SAGAS: Final = """
WITH known AS MATERIALIZED (
    SELECT saga_id, state, stuck, reason FROM {schema}.saga
    WHERE participant = %s AND saga_id = ANY(%s) ORDER BY saga_id FOR UPDATE
), added AS (
    INSERT INTO {schema}.saga (saga_id, participant, decides, state)
    SELECT wanted.saga_id, %s, %s, 'running' FROM unnest(%s::uuid[]) AS wanted (saga_id)
    WHERE NOT EXISTS (SELECT 1 FROM known WHERE known.saga_id = wanted.saga_id)
    ORDER BY wanted.saga_id
    ON CONFLICT DO NOTHING RETURNING saga_id, state, stuck, reason
)
SELECT saga_id, state, stuck, reason, false AS new FROM known
UNION ALL SELECT saga_id, state, stuck, reason, true AS new FROM added
"""
_RUNS_OF_SAGAS: Final = """
SELECT saga_id, step, trigger_id, state FROM {schema}.saga_step
WHERE participant = %s AND saga_id = ANY(%s)
"""
_INSERT_RUNS: Final = """
INSERT INTO {schema}.saga_step
    (saga_id, participant, step, trigger_id, trigger, state, emitted, published, reason)
SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::uuid[], %s::bytea[], %s::text[],
    %s::bytea[], %s::text[], %s::text[])
"""


@dataclass
class Remembered:
    """What the transaction of a batch knows of the sagas that it has locked."""

    sagas: dict[UUID, SagaRow]
    runs: dict[UUID, dict[tuple[str, UUID], StepState]]
    """Of each of these sagas, by step and trigger."""
    unwritten: list[tuple[object, ...]] = field(default_factory=list)


def remember(
    session: Session,
    participant: str,
    schema: str,
    *,
    decides: bool,
    sagas: Iterable[UUID],
    opens: Collection[UUID],
) -> None:
    """Lock *sagas* for the rest of the transaction, adding those among them that are in *opens*."""
    execute = executor(session)
    wanted = sorted(sagas)
    values = (participant, wanted, participant, decides, sorted(opens))
    rows = {
        saga_id: SagaRow(saga_id, SagaState(state), stuck, reason, new)
        for saga_id, state, stuck, reason, new in execute(
            in_schema(_LOCK_SAGAS, schema), values, True
        )
    }
    runs: dict[UUID, dict[tuple[str, UUID], StepState]] = {saga_id: {} for saga_id in rows}
    if known := [saga_id for saga_id, row in rows.items() if not row.new]:
        found = execute(in_schema(_RUNS_OF_SAGAS, schema), (participant, known), True)
        for saga_id, step, trigger_id, state in found:
            runs[saga_id][step, trigger_id] = StepState(state)
    remembered = session.info[_name(participant, schema)] = Remembered(rows, runs)

    @event.listens_for(session, "before_commit")
    def write(session: Session) -> None:
        if not session.in_nested_transaction():
            _write(session, schema, remembered)


def remembered_in(session: Any, participant: str, schema: str) -> Remembered | None:
    """What `remember` has noted in the transaction of *session*, if it has."""
    if not isinstance(session, Session):
        return None
    remembered: Remembered | None = session.info.get(_name(participant, schema))
    return remembered


class BatchJournal(SqlJournal):
    """A journal in the transaction of a batch."""

    def __init__(
        self,
        session: Any,
        participant: str,
        schema: str,
        *,
        decides: bool,
        remembered: Remembered,
    ) -> None:
        super().__init__(session, participant, schema, decides=decides)
        self._remembered = remembered

    def lock(self, saga_id: UUID) -> SagaRow:
        row = self._remembered.sagas.get(saga_id)
        if row is None:
            return super().lock(saga_id)
        if row.new:
            self._remembered.sagas[saga_id] = replace(row, new=False)
        return row

    def move(self, saga: SagaRow, state: SagaState, *, stuck: bool, reason: str | None) -> SagaRow:
        row = super().move(saga, state, stuck=stuck, reason=reason)
        if saga.saga_id in self._remembered.sagas:
            self._remembered.sagas[saga.saga_id] = row
        return row

    def find(self, key: RunKey) -> StepState | None:
        runs = self._remembered.runs.get(key.saga_id)
        return super().find(key) if runs is None else runs.get((key.step, key.trigger_id))

    def record(
        self,
        key: RunKey,
        before: StepState | None,
        after: StepState,
        *,
        trigger: bytes,
        emitted: bytes | None = None,
        published: Sequence[Emission] = (),
        reason: str | None = None,
    ) -> None:
        if before is None and self._has(key) and not self.session.in_nested_transaction():
            check_step_move(key, before, after)
            outcome = (trigger, after.value, emitted, written(published), reason)
            self._remembered.unwritten.append((*self._key(key), *outcome))
        else:
            self._write()
            super().record(
                key, before, after,
                trigger=trigger, emitted=emitted, published=published, reason=reason,
            )  # fmt: skip
        self._note(key, after)

    def advance(
        self, key: RunKey, before: StepState, after: StepState, *, reason: str | None = None
    ) -> None:
        self._write()
        super().advance(key, before, after, reason=reason)
        self._note(key, after)

    def runs(self, saga_id: UUID) -> list[StepRow]:
        self._write()
        return super().runs(saga_id)

    def claim(self, key: RunKey) -> ClaimedRun | None:
        self._write()
        return super().claim(key)

    def _has(self, key: RunKey) -> bool:
        return key.saga_id in self._remembered.runs

    def _note(self, key: RunKey, state: StepState) -> None:
        if self._has(key):
            self._remembered.runs[key.saga_id][key.step, key.trigger_id] = state

    def _write(self) -> None:
        _write(self.session, self._schema, self._remembered)


def _write(session: Session, schema: str, remembered: Remembered) -> None:
    if remembered.unwritten:
        columns = [list(column) for column in zip(*remembered.unwritten, strict=True)]
        executor(session)(in_schema(_INSERT_RUNS, schema), columns, False)
        remembered.unwritten.clear()


def _name(participant: str, schema: str) -> tuple[str, str, str]:
    return ("saga.batching", participant, schema)
