"""The journal in PostgreSQL: all SQL of the saga runtime.

What holds at READ COMMITTED, and why:

- *One operation at a time per saga and participant.* Each operation begins with `lock` (or `open`),
  and the row stays locked until its transaction ends. Where there is no row yet, the insert takes
  its place: a second inserter of the same key waits for the first, then finds the row (and locks
  it) or, after a rollback, inserts its own. There is no moment at which both have found nothing.
- *Who holds the lock sees all that earlier holders wrote.* Every statement has a snapshot of its
  own, taken after `lock` returned, hence after the earlier holder's commit.
- *A run is recorded once.* The primary key (saga, participant, step, trigger) says so even if the
  inbox has forgotten the event; `record` and `advance` name the state that they start from, so a
  transition that is not in the state machine fails instead of being written.

A lock that is not had within `lock_timeout` raises `outbox.attempt.Busy`: the delivery is looked at
again later, and waiting for a slow step of the same saga uses up no attempt.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from outbox import pending
from outbox.attempt import Busy
from outbox.connections import executor
from outbox.envelope import Envelope
from outbox.events import EventType
from outbox.publishing import append
from outbox.sql import DEFAULT_SCHEMA, in_schema
from outbox.statements import statement
from outbox.transient import is_lock_timeout
from saga.context import Emission
from saga.errors import IllegalTransition
from saga.journal import (
    ClaimedRun,
    RunKey,
    SagaRow,
    SagaState,
    StepRow,
    StepState,
    check_saga_move,
    check_step_move,
)

if TYPE_CHECKING:
    from sqlalchemy import CursorResult

_OPEN_SAGA: Final = """
INSERT INTO {schema}.saga (saga_id, participant, definition, decides, state)
VALUES (%s, %s, %s, %s, 'running') ON CONFLICT DO NOTHING RETURNING true
"""
_RECORD_START: Final = """
INSERT INTO {schema}.saga_step (saga_id, participant, step, trigger_id, state, trigger, published)
VALUES (%s, %s, %s, %s, 'done', %s, %s)
"""
_INSERT_SAGA: Final = """
INSERT INTO {schema}.saga (saga_id, participant, decides, state)
VALUES (:saga_id, :participant, :decides, 'running') ON CONFLICT DO NOTHING RETURNING true
"""
_LOCK_SAGA: Final = """
SELECT state, stuck, reason FROM {schema}.saga
WHERE saga_id = :saga_id AND participant = :participant FOR UPDATE
"""
_MOVE_SAGA: Final = """
UPDATE {schema}.saga SET state = :after, stuck = :stuck, reason = :reason,
    changed_at = clock_timestamp()
WHERE saga_id = :saga_id AND participant = :participant AND state = :before
"""
_FIND_RUN: Final = """
SELECT state FROM {schema}.saga_step WHERE saga_id = :saga_id
    AND participant = :participant AND step = :step AND trigger_id = :trigger_id
"""
_CLAIM_RUN: Final = """
SELECT state, trigger, emitted FROM {schema}.saga_step WHERE saga_id = :saga_id
    AND participant = :participant AND step = :step AND trigger_id = :trigger_id FOR UPDATE
"""
_INSERT_RUN: Final = """
INSERT INTO {schema}.saga_step
    (saga_id, participant, step, trigger_id, state, trigger, emitted, published, reason)
VALUES (:saga_id, :participant, :step, :trigger_id, :after, :trigger, :emitted, :published, :reason)
"""
_RESUME_RUN: Final = """
UPDATE {schema}.saga_step
SET state = :after, emitted = :emitted, published = :published, reason = :reason,
    changed_at = clock_timestamp()
WHERE saga_id = :saga_id AND participant = :participant AND step = :step
    AND trigger_id = :trigger_id AND state = :before
"""
_ADVANCE_RUN: Final = """
UPDATE {schema}.saga_step SET state = :after, reason = :reason, changed_at = clock_timestamp()
WHERE saga_id = :saga_id AND participant = :participant AND step = :step
    AND trigger_id = :trigger_id AND state = :before
"""
_VERDICT: Final = """
SELECT event FROM {schema}.saga_intervention WHERE saga_id = :saga_id
    AND participant = :participant AND step = :step AND trigger_id = :trigger_id
    AND verb = 'resolve' ORDER BY id DESC LIMIT 1
"""
_RUNS: Final = """
SELECT step, trigger_id, state, reason, published FROM {schema}.saga_step
WHERE saga_id = :saga_id AND participant = :participant ORDER BY ordinal
"""
_ARRIVE: Final = """
INSERT INTO {schema}.saga_join_arrival (saga_id, participant, "join", type, event_id, body)
VALUES (:saga_id, :participant, :join_name, :type, :event_id, :body) ON CONFLICT DO NOTHING
"""
_ARRIVALS: Final = """
SELECT type, body FROM {schema}.saga_join_arrival
WHERE saga_id = :saga_id AND participant = :participant AND "join" = :join_name
"""
_ARRIVED: Final = """
SELECT "join", event_id FROM {schema}.saga_join_arrival
WHERE saga_id = :saga_id AND participant = :participant
"""
_ADOPT: Final = """
INSERT INTO {schema}.saga_child (child_id, participant, saga_id, step, trigger_id)
VALUES (:child_id, :participant, :saga_id, :step, :trigger_id)
"""
_PARENT: Final = """
SELECT saga_id, step, trigger_id FROM {schema}.saga_child
WHERE child_id = :child_id AND participant = :participant
"""
_KNOW_PEER: Final = """
INSERT INTO {schema}.saga_peer (participant, peer, takes, since)
VALUES (:participant, :peer, :takes, :since) ON CONFLICT DO NOTHING RETURNING true
"""
_CORRECT_PEER: Final = """
UPDATE {schema}.saga_peer SET takes = :takes, since = :since
WHERE participant = :participant AND peer = :peer AND since < :since
"""
_FORGET_PEER: Final = """
DELETE FROM {schema}.saga_peer WHERE participant = :participant AND peer = :peer
"""
_PEERS: Final = "SELECT peer, takes FROM {schema}.saga_peer WHERE participant = :participant"
_HEAR: Final = """
INSERT INTO {schema}.saga_peer_undone (saga_id, participant, peer, pending)
VALUES (:saga_id, :participant, :peer, :pending) ON CONFLICT DO NOTHING RETURNING true
"""
_HEAR_AGAIN: Final = """
UPDATE {schema}.saga_peer_undone SET pending = :pending
WHERE saga_id = :saga_id AND participant = :participant AND peer = :peer
"""
_HEARD: Final = """
SELECT peer, pending FROM {schema}.saga_peer_undone
WHERE saga_id = :saga_id AND participant = :participant
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
        execute = executor(self.session)  # refuses autocommit before anything is written
        saga = (start.saga_id, self._participant)
        if not execute(
            in_schema(_OPEN_SAGA, self._schema), (*saga, definition, self._decides), True
        ):
            return False
        published = _written([Emission(start.trigger_id, definition)])
        run = (*saga, start.step, start.trigger_id, trigger, published)
        execute(in_schema(_RECORD_START, self._schema), run, False)
        return True

    def lock(self, saga_id: UUID) -> SagaRow:
        with _busy_while_locked(f"saga {saga_id}"):
            while True:
                if self._execute(_INSERT_SAGA, saga_id=saga_id, decides=self._decides).scalar():
                    return SagaRow(saga_id, SagaState.RUNNING, new=True)
                row = self._execute(_LOCK_SAGA, saga_id=saga_id).one_or_none()
                if row is not None:
                    return SagaRow(saga_id, SagaState(row.state), row.stuck, row.reason)
                # The row that stood in the way has been purged meanwhile.

    def move(self, saga: SagaRow, state: SagaState, *, stuck: bool, reason: str | None) -> SagaRow:
        if state is not saga.state:
            check_saga_move(saga.saga_id, saga.state, state)
        result = self._execute(
            _MOVE_SAGA,
            saga_id=saga.saga_id,
            before=saga.state,
            after=state,
            stuck=stuck,
            reason=reason,
        )
        self._require_one(result, f"saga {saga.saga_id} does not stand at {saga.state}")
        return SagaRow(saga.saga_id, state, stuck, reason)

    def find(self, key: RunKey) -> StepState | None:
        state = self._execute(_FIND_RUN, **_columns(key)).scalar()
        return None if state is None else StepState(state)

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
        values = {
            **_columns(key),
            "after": after,
            "emitted": emitted,
            "published": _written(published),
            "reason": reason,
        }
        if before is None:
            self._execute(_INSERT_RUN, trigger=trigger, **values)
            return
        result = self._execute(_RESUME_RUN, before=before, **values)
        self._require_one(result, f"{key} does not stand at {before}")

    def advance(
        self, key: RunKey, before: StepState, after: StepState, *, reason: str | None = None
    ) -> None:
        check_step_move(key, before, after)
        result = self._execute(
            _ADVANCE_RUN, **_columns(key), before=before, after=after, reason=reason
        )
        self._require_one(result, f"{key} does not stand at {before}")

    def verdict(self, key: RunKey) -> str | None:
        event: str | None = self._execute(_VERDICT, **_columns(key)).scalar()
        return event

    def runs(self, saga_id: UUID) -> list[StepRow]:
        rows = self._execute(_RUNS, saga_id=saga_id).all()
        has_joins = any(row.trigger_id == saga_id for row in rows)
        arrived = self._arrived(saga_id) if has_joins else {}
        runs = []
        for row in rows:
            published = _read(row.published)
            is_start = any(one.event_id == row.trigger_id for one in published)
            causes = frozenset() if is_start else arrived.get(row.step, {row.trigger_id})
            key = RunKey(saga_id, row.step, row.trigger_id)
            state = StepState(row.state)
            runs.append(StepRow(key, state, row.reason, published, frozenset(causes)))
        return runs

    def _arrived(self, saga_id: UUID) -> dict[str, set[UUID]]:
        """The ids of the events that have come for each join."""
        arrived: dict[str, set[UUID]] = {}
        for row in self._execute(_ARRIVED, saga_id=saga_id):
            arrived.setdefault(row.join, set()).add(row.event_id)
        return arrived

    def claim(self, key: RunKey) -> ClaimedRun | None:
        with _busy_while_locked(str(key)):
            row = self._execute(_CLAIM_RUN, **_columns(key)).one_or_none()
        if row is None:
            return None
        return ClaimedRun(key, StepState(row.state), row.trigger, row.emitted)

    def arrive(self, saga_id: UUID, join: str, envelope: Envelope) -> None:
        self._execute(
            _ARRIVE,
            saga_id=saga_id,
            join_name=join,
            type=envelope.type,
            event_id=envelope.id,
            body=envelope.body,
        )

    def arrivals(self, saga_id: UUID, join: str) -> dict[str, bytes]:
        rows = self._execute(_ARRIVALS, saga_id=saga_id, join_name=join)
        return {row.type: row.body for row in rows}

    def adopt(self, child_id: UUID, parent: RunKey) -> None:
        self._execute(_ADOPT, child_id=child_id, **_columns(parent))

    def parent(self, child_id: UUID) -> RunKey | None:
        row = self._execute(_PARENT, child_id=child_id).one_or_none()
        return None if row is None else RunKey(row.saga_id, row.step, row.trigger_id)

    def know(self, peer: str, takes: Collection[str], since: UUID) -> bool:
        values = {"peer": peer, "takes": sorted(takes), "since": since}
        if self._execute(_KNOW_PEER, **values).scalar():
            return True
        self._execute(_CORRECT_PEER, **values)
        return False

    def forget(self, peer: str) -> bool:
        return bool(self._execute(_FORGET_PEER, peer=peer).rowcount)

    def peers(self) -> Mapping[str, frozenset[str]]:
        return {row.peer: frozenset(row.takes) for row in self._execute(_PEERS)}

    def hear(self, saga_id: UUID, peer: str, pending: Collection[UUID]) -> None:
        values = {"saga_id": saga_id, "peer": peer}
        if self._execute(_HEAR, **values, pending=sorted(pending)).scalar():
            return
        # What a peer owes only ever shrinks, so whatever order its words come in, all of them hold.
        both = self.heard(saga_id)[peer].intersection(pending)
        self._execute(_HEAR_AGAIN, **values, pending=sorted(both))

    def heard(self, saga_id: UUID) -> Mapping[str, frozenset[UUID]]:
        rows = self._execute(_HEARD, saga_id=saga_id)
        return {row.peer: frozenset(row.pending) for row in rows}

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

    def _execute(self, template: str, **values: object) -> CursorResult[Any]:
        result: CursorResult[Any] = self.session.execute(
            statement(template, self._schema), {"participant": self._participant, **values}
        )
        return result

    def _require_one(self, result: CursorResult[Any], otherwise: str) -> None:
        if result.rowcount != 1:
            raise IllegalTransition(otherwise)


def _columns(key: RunKey) -> dict[str, object]:
    return {"saga_id": key.saga_id, "step": key.step, "trigger_id": key.trigger_id}


def _written(published: Sequence[Emission]) -> str | None:
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
    except DBAPIError as error:
        if is_lock_timeout(error):
            # Without the cause, which would make it look like something to try again at once.
            raise Busy(f"{what} is being worked on by another transaction") from None
        raise
