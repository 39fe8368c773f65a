"""The journal in PostgreSQL: all SQL of the saga runtime.

What holds at READ COMMITTED, and why:

- *One operation at a time per saga and participant.* Each operation begins with `lock` (or `open`),
  and the row stays locked until its transaction ends. `lock` is one statement: it locks the row or,
  where there is none, adds it. A second one that adds the same key waits for the first; after its
  rollback it adds its own, after its commit it has neither added a row nor (in the snapshot that it
  began with) found one, and looks again. There is no moment at which both have found nothing.
- *Who holds the lock sees all that earlier holders wrote.* Every statement has a snapshot of its
  own, taken after `lock` returned, hence after the earlier holder's commit.
- *A run is recorded once.* The primary key (saga, participant, step, trigger) says so even if the
  inbox has forgotten the event; `record` and `advance` name the state that they start from, so a
  transition that is not in the state machine fails instead of being written.

A lock that is not had within `lock_timeout` raises `outbox.work.Busy`: the delivery is looked at
again later, and waiting for a slow step of the same saga uses up no attempt.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Final
from uuid import UUID

import psycopg
from sqlalchemy.exc import DBAPIError

from outbox import pending
from outbox.connections import Execute, Rows, executor
from outbox.envelope import Envelope
from outbox.events import EventType
from outbox.publishing import append
from outbox.sql import DEFAULT_SCHEMA, in_schema
from outbox.transient import is_lock_timeout
from outbox.work import Busy
from saga.context import Emission
from saga.errors import IllegalTransition
from saga.journal import (
    ClaimedRun,
    PeersOfSaga,
    RunKey,
    SagaRow,
    SagaState,
    StepRow,
    StepState,
    check_saga_move,
    check_step_move,
)

_OPEN_SAGA: Final = """
INSERT INTO {schema}.saga (saga_id, participant, definition, decides, state)
VALUES (%s, %s, %s, %s, 'running') ON CONFLICT DO NOTHING RETURNING true
"""
_RECORD_START: Final = """
INSERT INTO {schema}.saga_step (saga_id, participant, step, trigger_id, state, trigger, published)
VALUES (%s, %s, %s, %s, 'done', %s, %s)
"""
# No row: another transaction has added it since this statement began.
_LOCK_SAGA: Final = """
WITH known AS MATERIALIZED (
    SELECT state, stuck, reason FROM {schema}.saga
    WHERE saga_id = %s AND participant = %s FOR UPDATE
), added AS (
    INSERT INTO {schema}.saga (saga_id, participant, decides, state)
    SELECT %s, %s, %s, 'running' WHERE NOT EXISTS (SELECT 1 FROM known)
    ON CONFLICT DO NOTHING RETURNING state, stuck, reason
)
SELECT state, stuck, reason, false AS new FROM known
UNION ALL SELECT state, stuck, reason, true AS new FROM added
"""
_LOCK_KNOWN: Final = """
SELECT state, stuck, reason FROM {schema}.saga WHERE saga_id = %s AND participant = %s FOR UPDATE
"""
_MOVE_SAGA: Final = """
UPDATE {schema}.saga SET state = %s, stuck = %s, reason = %s, changed_at = clock_timestamp()
WHERE saga_id = %s AND participant = %s AND state = %s RETURNING true
"""
_RUN: Final = "saga_id = %s AND participant = %s AND step = %s AND trigger_id = %s"
_FIND_RUN: Final = f"SELECT state FROM {{schema}}.saga_step WHERE {_RUN}"  # noqa: S608
_CLAIM_RUN: Final = f"""
SELECT state, trigger, emitted FROM {{schema}}.saga_step WHERE {_RUN} FOR UPDATE
"""  # noqa: S608
_INSERT_RUN: Final = """
INSERT INTO {schema}.saga_step
    (saga_id, participant, step, trigger_id, trigger, state, emitted, published, reason)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_RESUME_RUN: Final = f"""
UPDATE {{schema}}.saga_step
SET state = %s, emitted = %s, published = %s, reason = %s, changed_at = clock_timestamp()
WHERE {_RUN} AND state = %s RETURNING true
"""  # noqa: S608
_ADVANCE_RUN: Final = f"""
UPDATE {{schema}}.saga_step SET state = %s, reason = %s, changed_at = clock_timestamp()
WHERE {_RUN} AND state = %s RETURNING true
"""  # noqa: S608
_VERDICT: Final = f"""
SELECT event FROM {{schema}}.saga_intervention
WHERE {_RUN} AND verb = 'resolve' ORDER BY id DESC LIMIT 1
"""  # noqa: S608
_RUNS: Final = """
SELECT step, trigger_id, state, reason, published FROM {schema}.saga_step
WHERE saga_id = %s AND participant = %s ORDER BY ordinal
"""
_ARRIVE: Final = """
INSERT INTO {schema}.saga_join_arrival (saga_id, participant, "join", type, event_id, body)
VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
_ARRIVALS: Final = """
SELECT type, body FROM {schema}.saga_join_arrival
WHERE saga_id = %s AND participant = %s AND "join" = %s
"""
_ARRIVED: Final = """
SELECT "join", event_id FROM {schema}.saga_join_arrival WHERE saga_id = %s AND participant = %s
"""
_ADOPT: Final = """
INSERT INTO {schema}.saga_child (child_id, saga_id, participant, step, trigger_id)
VALUES (%s, %s, %s, %s, %s)
"""
_PARENT: Final = """
SELECT saga_id, step, trigger_id FROM {schema}.saga_child
WHERE child_id = %s AND participant = %s
"""
_KNOW_PEER: Final = """
INSERT INTO {schema}.saga_peer (participant, peer, takes, since)
VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING true
"""
_CORRECT_PEER: Final = """
UPDATE {schema}.saga_peer SET takes = %s, since = %s
WHERE participant = %s AND peer = %s AND since < %s
"""
_FORGET_PEER: Final = """
DELETE FROM {schema}.saga_peer WHERE participant = %s AND peer = %s RETURNING true
"""
_PEERS: Final = "SELECT peer, takes FROM {schema}.saga_peer WHERE participant = %s"
_HEAR: Final = """
INSERT INTO {schema}.saga_peer_undone (saga_id, participant, peer, pending)
VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING true
"""
_HEAR_AGAIN: Final = """
UPDATE {schema}.saga_peer_undone SET pending = %s
WHERE saga_id = %s AND participant = %s AND peer = %s
"""
_PEERS_OF_SAGA: Final = """
SELECT peer, NULL AS takes, pending FROM {schema}.saga_peer_undone
WHERE saga_id = %s AND participant = %s
UNION ALL SELECT peer, takes, NULL AS pending FROM {schema}.saga_peer WHERE participant = %s
"""

_AT_ONCE: Final = timedelta(0)


class SqlJournal:
    """One participant's journal in an open transaction (see `Journal`).

    *session* is a SQLAlchemy `Session`; for `open` alone, whatever `outbox.publish` takes.
    """

    def __init__(
        self,
        session: Any,
        participant: str,
        schema: str = DEFAULT_SCHEMA,
        *,
        decides: bool = False,
    ) -> None:
        """*decides*: sagas are decided by this participant, so it is the one to abort them."""
        self.session = session
        self._participant = participant
        self._schema = schema
        self._decides = decides

    def open(self, start: RunKey, definition: str, trigger: bytes) -> bool:
        saga = (start.saga_id, self._participant)
        if not self._rows(_OPEN_SAGA, *saga, definition, self._decides):
            return False
        published = written([Emission(start.trigger_id, definition)])
        self._do(_RECORD_START, *saga, start.step, start.trigger_id, trigger, published)
        return True

    def lock(self, saga_id: UUID) -> SagaRow:
        saga = (saga_id, self._participant)
        with _busy_while_locked(f"saga {saga_id}"):
            while not (rows := self._rows(_LOCK_SAGA, *saga, *saga, self._decides)):
                pass
        ((state, stuck, reason, new),) = rows
        return SagaRow(saga_id, SagaState(state), stuck, reason, new)

    def lock_known(self, saga_id: UUID) -> SagaRow | None:
        with _busy_while_locked(f"saga {saga_id}"):
            rows = self._rows(_LOCK_KNOWN, saga_id, self._participant)
        for state, stuck, reason in rows:
            return SagaRow(saga_id, SagaState(state), stuck, reason)
        return None

    def move(self, saga: SagaRow, state: SagaState, *, stuck: bool, reason: str | None) -> SagaRow:
        if state is not saga.state:
            check_saga_move(saga.saga_id, saga.state, state)
        key = (saga.saga_id, self._participant)
        if not self._rows(_MOVE_SAGA, state.value, stuck, reason, *key, saga.state.value):
            raise IllegalTransition(f"saga {saga.saga_id} does not stand at {saga.state}")
        return SagaRow(saga.saga_id, state, stuck, reason)

    def find(self, key: RunKey) -> StepState | None:
        rows = self._rows(_FIND_RUN, *self._key(key))
        return StepState(rows[0][0]) if rows else None

    def known_as(self, key: RunKey) -> RunKey:
        return key

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
        check_step_move(key, before, after)
        outcome = (after.value, emitted, written(published), reason)
        if before is None:
            self._do(_INSERT_RUN, *self._key(key), trigger, *outcome)
        elif not self._rows(_RESUME_RUN, *outcome, *self._key(key), before.value):
            raise IllegalTransition(f"{key} does not stand at {before}")

    def advance(
        self, key: RunKey, before: StepState, after: StepState, *, reason: str | None = None
    ) -> None:
        check_step_move(key, before, after)
        if not self._rows(_ADVANCE_RUN, after.value, reason, *self._key(key), before.value):
            raise IllegalTransition(f"{key} does not stand at {before}")

    def verdict(self, key: RunKey) -> str | None:
        rows = self._rows(_VERDICT, *self._key(key))
        return rows[0][0] if rows else None

    def runs(self, saga_id: UUID) -> list[StepRow]:
        return self._step_rows(saga_id, self._rows(_RUNS, saga_id, self._participant))

    def _step_rows(self, saga_id: UUID, rows: Rows) -> list[StepRow]:
        has_joins = any(trigger_id == saga_id for _, trigger_id, *_ in rows)
        arrived = self._arrived(saga_id) if has_joins else {}
        runs = []
        for step, trigger_id, state, reason, written in rows:
            published = _read(written)
            is_start = any(one.event_id == trigger_id for one in published)
            causes = frozenset() if is_start else arrived.get(step, {trigger_id})
            key = RunKey(saga_id, step, trigger_id)
            runs.append(StepRow(key, StepState(state), reason, published, frozenset(causes)))
        return runs

    def _arrived(self, saga_id: UUID) -> dict[str, set[UUID]]:
        """The ids of the events that have come for each join."""
        arrived: dict[str, set[UUID]] = {}
        for join, event_id in self._rows(_ARRIVED, saga_id, self._participant):
            arrived.setdefault(join, set()).add(event_id)
        return arrived

    def claim(self, key: RunKey) -> ClaimedRun | None:
        with _busy_while_locked(str(key)):
            rows = self._rows(_CLAIM_RUN, *self._key(key))
        for state, trigger, emitted in rows:
            return ClaimedRun(key, StepState(state), trigger, emitted)
        return None

    def arrive(self, saga_id: UUID, join: str, envelope: Envelope) -> None:
        event = (envelope.type, envelope.id, envelope.body)
        self._do(_ARRIVE, saga_id, self._participant, join, *event)

    def arrivals(self, saga_id: UUID, join: str) -> dict[str, bytes]:
        return dict(self._rows(_ARRIVALS, saga_id, self._participant, join))

    def adopt(self, child_id: UUID, parent: RunKey) -> None:
        self._do(_ADOPT, child_id, *self._key(parent))

    def parent(self, child_id: UUID) -> RunKey | None:
        rows = self._rows(_PARENT, child_id, self._participant)
        return RunKey(*rows[0]) if rows else None

    def know(self, peer: str, takes: Collection[str], since: UUID) -> bool:
        of = (self._participant, peer)
        if self._rows(_KNOW_PEER, *of, sorted(takes), since):
            return True
        self._do(_CORRECT_PEER, sorted(takes), since, *of, since)
        return False

    def forget(self, peer: str) -> bool:
        return bool(self._rows(_FORGET_PEER, self._participant, peer))

    def peers(self) -> Mapping[str, frozenset[str]]:
        return {peer: frozenset(takes) for peer, takes in self._rows(_PEERS, self._participant)}

    def hear(self, saga_id: UUID, peer: str, pending: Collection[UUID]) -> None:
        of = (saga_id, self._participant, peer)
        if self._rows(_HEAR, *of, sorted(pending)):
            return
        # What a peer owes only ever shrinks, so whatever order its words come in, all of them hold.
        both = self.peers_of(saga_id).heard[peer].intersection(pending)
        self._do(_HEAR_AGAIN, sorted(both), *of)

    def peers_of(self, saga_id: UUID) -> PeersOfSaga:
        rows = self._rows(_PEERS_OF_SAGA, saga_id, self._participant, self._participant)
        heard = {peer: frozenset(pending) for peer, takes, pending in rows if takes is None}
        known = {peer: frozenset(takes) for peer, takes, _ in rows if takes is not None}
        return self._among(heard, known)

    def _among(
        self, heard: Mapping[str, frozenset[UUID]], known: Mapping[str, frozenset[str]]
    ) -> PeersOfSaga:
        silent = known.keys() - heard.keys() - {self._participant}
        return PeersOfSaga(heard, {peer: known[peer] for peer in silent})

    def append(self, envelope: Envelope, event_type: EventType) -> None:
        append(self.session, envelope, event_type, schema=self._schema)

    def schedule(
        self,
        handler: str,
        envelope: Envelope,
        due_at: datetime | None = None,
        *,
        delay: timedelta = _AT_ONCE,
    ) -> None:
        pending.schedule(
            self.session, self._participant, handler, envelope, due_at,
            delay=delay, schema=self._schema,
        )  # fmt: skip

    def savepoint(self) -> AbstractContextManager[Any]:
        savepoint: AbstractContextManager[Any] = self.session.begin_nested()
        return savepoint

    def flush(self) -> None:
        self.session.flush()

    @cached_property
    def _execute(self) -> Execute:
        return executor(self.session)

    def _rows(self, template: str, *values: object) -> Rows:
        return self._execute(in_schema(template, self._schema), values, True)

    def _do(self, template: str, *values: object) -> None:
        self._execute(in_schema(template, self._schema), values, False)

    def _key(self, run: RunKey) -> tuple[UUID, str, str, UUID]:
        return run.saga_id, self._participant, run.step, run.trigger_id


def written(published: Sequence[Emission]) -> str | None:
    """What a run has published, as its row holds it."""
    if not published:
        return None
    return json.dumps([(str(one.event_id), one.type) for one in published])


def _read(published: str | None) -> tuple[Emission, ...]:
    if published is None:
        return ()
    return tuple(Emission(UUID(event_id), type) for event_id, type in json.loads(published))


@contextmanager
def _busy_while_locked(what: str) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, psycopg.Error) as error:
        if is_lock_timeout(error):
            # Without the cause, which would make it look like something to try again at once.
            raise Busy(f"{what} is being worked on by another transaction") from None
        raise
