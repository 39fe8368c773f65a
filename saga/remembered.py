"""What the transaction of a batch knows of the sagas that it has locked, and has not written yet.

All SQL of `saga.batching`: each statement reads or writes for all sagas of the batch at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Final
from uuid import UUID

from outbox import pending
from outbox.connections import Rows, executor
from outbox.envelope import Envelope
from outbox.savepoints import Savepoint
from outbox.sql import in_schema
from saga.errors import IllegalTransition
from saga.journal import RunKey, SagaRow, SagaState, StepState

_LOCK_SAGAS: Final = """
WITH known AS MATERIALIZED (
    SELECT saga_id, state, stuck, reason FROM {schema}.saga
    WHERE participant = %s AND saga_id = ANY(%b) ORDER BY saga_id FOR UPDATE
), added AS (
    INSERT INTO {schema}.saga (saga_id, participant, decides, state)
    SELECT wanted.saga_id, %s, %s, 'running' FROM unnest(%b::uuid[]) AS wanted (saga_id)
    WHERE NOT EXISTS (SELECT 1 FROM known WHERE known.saga_id = wanted.saga_id)
    ORDER BY wanted.saga_id
    ON CONFLICT DO NOTHING RETURNING saga_id, state, stuck, reason
)
SELECT saga_id, state, stuck, reason, false AS new FROM known
UNION ALL SELECT saga_id, state, stuck, reason, true AS new FROM added
"""
# The bodies only of what may be compensated now: most runs of a batch's sagas are not looked into.
_RUNS_OF_SAGAS: Final = """
SELECT saga_id, step, trigger_id, state, reason, published,
    CASE WHEN state IN ('compensating', 'compensation_stuck') THEN trigger END,
    CASE WHEN state IN ('compensating', 'compensation_stuck') THEN emitted END
FROM {schema}.saga_step
WHERE participant = %s AND saga_id = ANY(%b) ORDER BY ordinal
"""
_HEARD_OF_SAGAS: Final = """
SELECT saga_id, peer, pending FROM {schema}.saga_peer_undone
WHERE participant = %s AND saga_id = ANY(%b)
"""
_MOVE_SAGAS: Final = """
UPDATE {schema}.saga AS saga
SET state = new.after, stuck = new.stuck, reason = new.reason, changed_at = clock_timestamp()
FROM unnest(%b::uuid[], %b::text[], %b::text[], %b::boolean[], %b::text[])
    AS new (saga_id, before, after, stuck, reason)
WHERE saga.participant = %s AND saga.saga_id = new.saga_id AND saga.state = new.before
RETURNING true
"""
_INSERT_RUNS: Final = """
INSERT INTO {schema}.saga_step
    (participant, saga_id, step, trigger_id, trigger, state, emitted, published, reason)
SELECT %s, * FROM unnest(%b::uuid[], %b::text[], %b::uuid[], %b::bytea[], %b::text[],
    %b::bytea[], %b::text[], %b::text[])
"""
_ADVANCE_RUNS: Final = """
UPDATE {schema}.saga_step AS run
SET state = new.after, reason = new.reason, changed_at = clock_timestamp()
FROM unnest(%b::uuid[], %b::text[], %b::uuid[], %b::text[], %b::text[], %b::text[])
    AS new (saga_id, step, trigger_id, before, after, reason)
WHERE run.participant = %s AND run.saga_id = new.saga_id AND run.step = new.step
    AND run.trigger_id = new.trigger_id AND run.state = new.before
RETURNING true
"""
_HEAR: Final = """
INSERT INTO {schema}.saga_peer_undone (participant, saga_id, peer, pending)
SELECT %s, new.saga_id, new.peer, string_to_array(new.pending, ',')::uuid[]
FROM unnest(%b::uuid[], %b::text[], %b::text[]) AS new (saga_id, peer, pending)
ON CONFLICT (saga_id, participant, peer) DO UPDATE SET pending = EXCLUDED.pending
"""


@dataclass
class Run:
    """One run as the transaction leaves it so far."""

    key: RunKey
    state: StepState
    reason: str | None
    published: str | None
    """As its row holds it."""
    trigger: bytes | None
    """None where it was not read."""
    emitted: bytes | None
    stands_at: StepState | None
    """Its state in the table; None where it is not there yet."""


@dataclass
class Remembered:
    """All that is known is what the table holds, with what is still to be written on top of it."""

    session: Any
    participant: str
    schema: str
    sagas: dict[UUID, SagaRow] = field(default_factory=dict)
    runs: dict[UUID, dict[RunKey, Run]] = field(default_factory=dict)
    """Of each of these sagas, oldest first."""
    heard: dict[UUID, dict[str, frozenset[UUID]]] | None = None
    """What peers have said of each; None before it was asked for."""
    peers: Mapping[str, frozenset[str]] | None = None
    """Who takes part, as `Journal.peers` says; None before it was asked for."""
    is_doomed: bool = False
    is_in_savepoint: bool = False
    """Whether a step's function runs that may yet reject."""

    _moved: dict[UUID, SagaState] = field(default_factory=dict)
    _changed: dict[RunKey, Run] = field(default_factory=dict)
    _heard_anew: set[tuple[UUID, str]] = field(default_factory=set)
    _owed: list[tuple[str, Envelope, datetime | None, timedelta]] = field(default_factory=list)

    @cached_property
    def savepoint(self) -> Savepoint:
        return Savepoint(self.session)

    @property
    def may_be_taken_back(self) -> bool:
        """Whether what is written now may be taken back without the rest of the batch."""
        return self.is_in_savepoint or bool(self.session.in_nested_transaction())

    def lock(self, sagas: Iterable[UUID], opens: Collection[UUID], *, decides: bool) -> None:
        """Lock *sagas*, adding those among them that are in *opens*, and read their runs."""
        of = self.participant
        rows = self._do(_LOCK_SAGAS, of, sorted(sagas), of, decides, sorted(opens), returns=True)
        for saga_id, state, stuck, reason, new in rows:
            self.sagas[saga_id] = SagaRow(saga_id, SagaState(state), stuck, reason, new)
            self.runs[saga_id] = {}
        known = [saga_id for saga_id, row in self.sagas.items() if not row.new]
        for saga_id, step, trigger_id, state, reason, published, trigger, emitted in (
            self._do(_RUNS_OF_SAGAS, of, known, returns=True) if known else ()
        ):
            key, at = RunKey(saga_id, step, trigger_id), StepState(state)
            self.runs[saga_id][key] = Run(key, at, reason, published, trigger, emitted, at)

    def move(self, before: SagaRow, after: SagaRow) -> None:
        self._moved.setdefault(after.saga_id, before.state)
        self.sagas[after.saga_id] = after

    def add(self, run: Run) -> None:
        self.runs[run.key.saga_id][run.key] = self._changed[run.key] = run

    def advance(self, run: Run, after: StepState, reason: str | None) -> None:
        run.state, run.reason = after, reason
        self._changed[run.key] = run

    def heard_of(self, saga_id: UUID) -> dict[str, frozenset[UUID]]:
        """What each peer has said that it may not have undone, in one of the batch's sagas."""
        if self.heard is None:
            self.heard = {one: {} for one in self.sagas}
            rows = self._do(_HEARD_OF_SAGAS, self.participant, sorted(self.sagas), returns=True)
            for one, peer, pending_there in rows:
                self.heard[one][peer] = frozenset(pending_there)
        return self.heard[saga_id]

    def hear(self, saga_id: UUID, peer: str, pending_there: frozenset[UUID]) -> None:
        self.heard_of(saga_id)[peer] = pending_there
        self._heard_anew.add((saga_id, peer))

    def owe(
        self, handler: str, envelope: Envelope, due_at: datetime | None, delay: timedelta
    ) -> None:
        self._owed.append((handler, envelope, due_at, delay))

    def write(self) -> None:
        """Write all that is unwritten. Raises `IllegalTransition` where the tables say otherwise."""
        if self.is_doomed:
            raise IllegalTransition("a saga was operated on in a savepoint of this batch")
        of = self.participant
        new = [run for run in self._changed.values() if run.stands_at is None]
        if new:
            rows = [
                (*_key(run), run.trigger, run.state.value, run.emitted, run.published, run.reason)
                for run in new
            ]
            self._do(_INSERT_RUNS, of, *_columns(rows))
        if advanced := [run for run in self._changed.values() if run.stands_at is not None]:
            changes = [
                (*_key(run), run.stands_at.value, run.state.value, run.reason)
                for run in advanced
                if run.stands_at is not None
            ]
            self._all(_ADVANCE_RUNS, changes)
        if self._moved:
            self._all(_MOVE_SAGAS, [
                (row.saga_id, before.value, row.state.value, row.stuck, row.reason)
                for row, before in ((self.sagas[one], at) for one, at in self._moved.items())
            ])  # fmt: skip
        if self._heard_anew:
            said = [
                (saga_id, peer, ",".join(sorted(map(str, self.heard_of(saga_id)[peer]))))
                for saga_id, peer in sorted(self._heard_anew)
            ]
            self._do(_HEAR, of, *_columns(said))
        if self._owed:
            pending.schedule_all(self.session, of, self._owed, schema=self.schema)
        for run in self._changed.values():
            run.stands_at = run.state
        for unwritten in (self._moved, self._changed, self._heard_anew, self._owed):
            unwritten.clear()

    def forget(self) -> None:
        """Write, and know nothing more: from now on each statement reads for itself."""
        self.write()
        self.sagas.clear()
        self.runs.clear()
        self.heard = self.peers = None

    def doom(self) -> None:
        """Let it not be committed."""
        self.is_doomed = True

    def _all(self, template: str, changes: Sequence[tuple[object, ...]]) -> None:
        rows = self._do(template, *_columns(changes), self.participant, returns=True)
        if len(rows) != len(changes):
            raise IllegalTransition(
                f"{len(changes) - len(rows)} of {len(changes)} rows of {self.participant} do not "
                f"stand where this batch has read them: {[str(one[0]) for one in changes]}"
            )

    def _do(self, template: str, *values: object, returns: bool = False) -> Rows:
        return executor(self.session)(in_schema(template, self.schema), values, returns)


def _key(run: Run) -> tuple[UUID, str, UUID]:
    return run.key.saga_id, run.key.step, run.key.trigger_id


def _columns(rows: Sequence[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]
