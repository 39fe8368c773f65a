"""The journal of a batch: what several deliveries in one transaction read and write, at once.

Before the first handler of a batch runs, one statement locks the rows of all its sagas, adding those
that are missing, and one reads where their runs stand. What the batch makes of them is written with
a few statements just before its commit.

Why it reads what each statement by itself would have read: all that is remembered here is written
only by who holds the saga's lock. The second statement begins after the first has all locks, so it
sees all that earlier holders wrote; from then on until the commit this transaction is the holder,
and its own writes go through `BatchJournal`, which remembers them. (Who compensates alone locks its
run before the saga. It changes the run only under the saga's lock, from the state that it has read:
so of two that call the same compensation, which the inbox forbids, the second to write fails.) What
is not remembered (another transaction added the row in that very moment, or a handler turns to a
saga that its event does not name) is asked for one by one. Rows are locked in the order of their
ids, which is the order in which handlers run, so two batches do not wait for each other in a circle.

Why nothing is lost: what is not written yet is written before any statement of the journal that
could miss it, before an operator's command that a handler gives in this transaction, and before the
commit, never inside a savepoint: a rollback to that takes none along. (Inside one only a user's
function writes, and nothing of what it does waits.)

A step that may reject has a savepoint that is moved, not made (`outbox.savepoints`): a quarter of what
a batch cost went into the session's own. Where it cannot be taken back, the batch ends and each of its
deliveries is run alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.orm import Session

from outbox.envelope import Envelope
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
from saga.reaction import Reject
from saga.remembered import Remembered, Run
from saga.store import SqlJournal, written

_REMEMBERED: Final = "saga.batching"
"""Key in `session.info`: what is remembered, by participant and schema."""


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
    remembered = Remembered(session, participant, schema)
    remembered.lock(sagas, opens, decides=decides)
    session.info.setdefault(_REMEMBERED, {})[participant, schema] = remembered

    @event.listens_for(session, "before_commit")
    def write(session: Session) -> None:
        if not session.in_nested_transaction():
            remembered.write()


def remembered_in(session: Any, participant: str, schema: str) -> Remembered | None:
    """What `remember` has noted in the transaction of *session*, if it has."""
    if not isinstance(session, Session):
        return None
    remembered: Remembered | None = session.info.get(_REMEMBERED, {}).get((participant, schema))
    return remembered


def forget(session: Session) -> None:
    """Write what a batch in this transaction has not written yet, for who works on the tables.

    Inside a savepoint that cannot be: then the batch ends, and each of its deliveries is run alone.
    """
    for remembered in session.info.pop(_REMEMBERED, {}).values():
        if remembered.may_be_taken_back:
            remembered.doom()
        else:
            remembered.forget()


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
            self._remembered.sagas[saga_id] = SagaRow(saga_id, row.state, row.stuck, row.reason)
        return row

    def lock_known(self, saga_id: UUID) -> SagaRow | None:
        return self._remembered.sagas.get(saga_id) or super().lock_known(saga_id)

    def move(self, saga: SagaRow, state: SagaState, *, stuck: bool, reason: str | None) -> SagaRow:
        row = self._remembered.sagas.get(saga.saga_id)
        if row is None:
            return super().move(saga, state, stuck=stuck, reason=reason)
        if row.state is not saga.state:
            raise IllegalTransition(f"saga {saga.saga_id} does not stand at {saga.state}")
        if state is not saga.state:
            check_saga_move(saga.saga_id, saga.state, state)
        moved = SagaRow(saga.saga_id, state, stuck, reason)
        self._remembered.move(row, moved)
        return moved

    def find(self, key: RunKey) -> StepState | None:
        runs = self._remembered.runs.get(key.saga_id)
        if runs is None:
            return super().find(key)
        return runs[key].state if key in runs else None

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
        runs = self._remembered.runs.get(key.saga_id)
        if runs is not None and before is None and key not in runs:
            check_step_move(key, before, after)
            said = written(published)
            self._remembered.add(Run(key, after, reason, said, trigger, emitted, stands_at=None))
            return
        self._remembered.write()
        super().record(
            key, before, after,
            trigger=trigger, emitted=emitted, published=published, reason=reason,
        )  # fmt: skip
        if runs is not None:
            runs[key] = Run(key, after, reason, written(published), trigger, emitted, after)

    def advance(
        self, key: RunKey, before: StepState, after: StepState, *, reason: str | None = None
    ) -> None:
        runs = self._remembered.runs.get(key.saga_id)
        if runs is None:
            super().advance(key, before, after, reason=reason)
            return
        check_step_move(key, before, after)
        run = runs.get(key)
        if run is None or run.state is not before:
            raise IllegalTransition(f"{key} does not stand at {before}")
        self._remembered.advance(run, after, reason)

    def runs(self, saga_id: UUID) -> list[StepRow]:
        runs = self._remembered.runs.get(saga_id)
        if runs is None:
            return super().runs(saga_id)
        return self._step_rows(
            saga_id,
            [
                (run.key.step, run.key.trigger_id, run.state, run.reason, run.published)
                for run in runs.values()
            ],
        )

    def claim(self, key: RunKey) -> ClaimedRun | None:
        run = self._remembered.runs.get(key.saga_id, {}).get(key)
        if run is None or run.trigger is None:
            self._remembered.write()
            return super().claim(key)
        return ClaimedRun(key, run.state, run.trigger, run.emitted)

    def hear(self, saga_id: UUID, peer: str, pending: Collection[UUID]) -> None:
        if saga_id not in self._remembered.sagas:
            super().hear(saga_id, peer, pending)
            return
        # As `SqlJournal.hear`: all words of a peer hold.
        before = self._remembered.heard_of(saga_id).get(peer)
        now = frozenset(pending) if before is None else before.intersection(pending)
        if now != before:
            self._remembered.hear(saga_id, peer, now)

    def peers_of(self, saga_id: UUID) -> PeersOfSaga:
        if saga_id not in self._remembered.sagas:
            return super().peers_of(saga_id)
        return self._among(self._remembered.heard_of(saga_id), self.peers())

    def peers(self) -> Mapping[str, frozenset[str]]:
        if self._remembered.peers is None:
            self._remembered.peers = super().peers()
        return self._remembered.peers

    def know(self, peer: str, takes: Collection[str], since: UUID) -> bool:
        self._remembered.peers = None
        return super().know(peer, takes, since)

    def forget(self, peer: str) -> bool:
        self._remembered.peers = None
        return super().forget(peer)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """As of any journal, but only for what a `Reject` takes back: anything else takes back the batch."""
        remembered = self._remembered
        remembered.savepoint.move_here()
        remembered.is_in_savepoint = True
        try:
            yield
        except Reject as rejection:
            if not remembered.savepoint.take_back():
                raise IllegalTransition(
                    "a savepoint of the function that rejected holds events of others in this batch"
                ) from rejection
            raise
        finally:
            remembered.is_in_savepoint = False

    def schedule(
        self,
        handler: str,
        envelope: Envelope,
        due_at: datetime | None = None,
        *,
        delay: timedelta = timedelta(0),
    ) -> None:
        if self._remembered.may_be_taken_back:
            super().schedule(handler, envelope, due_at, delay=delay)
        else:
            self._remembered.owe(handler, envelope, due_at, delay)
