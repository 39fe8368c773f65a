"""The runtime with one thing taken away at a time: each must be found by the simulation.

A mutant is a context manager that breaks the real code for as long as it is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch
from uuid import UUID

from sqlalchemy.orm import Session

import saga.decisions
import saga.join
import saga.remembered
import saga.step
import saga.store
import saga.unwinding
from examples.order_saga.inventory.service import inventory
from examples.order_saga.order.service import order
from examples.order_saga.shipping.service import shipping
from examples.order_saga.users.service import users
from examples.trip_saga.trips import trips
from outbox import attempt, inbox
from outbox.batch import Batch
from outbox.inbox import Arrival
from outbox.statements import statement
from outbox.transactions import DeliverySession
from saga.deadline import run_deadline
from saga.join import join_key
from saga.journal import RunKey, SagaRow, SagaState
from saga.runtime import saga_id_of
from saga.step import Run, perform
from saga.store import _MOVE_SAGA, SqlJournal
from saga.testing.world import Message, Node

Mutant = Callable[[], AbstractContextManager[Any]]
PARTICIPANTS = (order, inventory, users, shipping, trips)


@contextmanager
def tombstone_dropped() -> Iterator[None]:
    """An abort that comes first leaves nothing behind, so the late step runs.

    (And no later word of a peer passes for the abort, which would undo that step after all.)
    """
    real = saga.unwinding.unwind

    def unwind(runtime: Any, journal: Any, row: Any, **options: Any) -> None:
        if row.new:
            table = statement(
                "DELETE FROM {schema}.saga WHERE saga_id = :id AND participant = :name", "outbox"
            )
            journal.session.execute(table, {"id": row.saga_id, "name": runtime.participant})
        else:
            real(runtime, journal, row, **options)

    with (
        patch.object(saga.decisions, "unwind", unwind),
        patch.object(saga.decisions, "hear_undone", lambda *_: None),
    ):
        yield


@contextmanager
def inbox_check_skipped() -> Iterator[None]:
    """Every delivery counts as the first."""

    def first_delivery(session: Session, event_id: Any, *_: Any, **__: Any) -> Arrival:
        return Arrival.FIRST

    with (
        patch.object(inbox, "first_delivery", first_delivery),
        patch.object(inbox, "earlier_delivery", lambda *_, **__: None),
    ):
        yield


@contextmanager
def inbox_in_its_own_transaction() -> Iterator[None]:
    """The delivery is recorded and committed before the handler runs."""
    real = attempt._begin

    def begin(session: Any, work: Any, **options: Any) -> Any:
        arrival = real(session, work, **options)
        session.commit_delivery()
        return arrival

    with patch.object(attempt, "_begin", begin):
        yield


def _with_handler(name_part: str, run: Callable[..., None]) -> AbstractContextManager[Any]:
    """Replace what the handlers run whose `run` is a `partial` of the function of that name."""
    stack = ExitStack()
    for participant in PARTICIPANTS:
        for name, handler in list(participant._handlers.items()):
            function = handler.run
            if isinstance(function, partial) and function.func.__name__ == name_part:
                mutated = replace(handler, run=partial(run, *function.args))
                stack.enter_context(patch.dict(participant._handlers, {name: mutated}))
    return stack


def join_counted_twice() -> AbstractContextManager[Any]:
    """The join fires for every event that comes once all are there, and again for duplicates."""

    def run_join(runtime: Any, join: Any, delivery: Any, session: Any) -> None:
        journal = runtime.open_journal(session)
        key = RunKey(saga_id_of(delivery), join.name, delivery.envelope.id)
        row = journal.lock(key.saga_id)
        before = journal.arrivals(key.saga_id, join.name)
        journal.arrive(key.saga_id, join.name, delivery.envelope)
        arrived = journal.arrivals(key.saga_id, join.name)
        if row.state.aborted or len(before) < len(join.on) - 1 or len(arrived) < len(join.on):
            return
        arguments = tuple(runtime.read(arrived[event_type.name]) for event_type in join.on)
        perform(runtime, journal, join, Run(row, key, None, delivery.envelope, arguments))

    stack = ExitStack()
    stack.enter_context(_with_handler("run_join", run_join))
    # With the inbox at work a duplicate never gets as far as the join.
    stack.enter_context(inbox_check_skipped())
    return stack


def join_after_abort() -> AbstractContextManager[Any]:
    """The join does not look whether the saga was aborted."""

    def run_join(runtime: Any, join: Any, delivery: Any, session: Any) -> None:
        journal = runtime.open_journal(session)
        key = join_key(join.name, saga_id_of(delivery))
        row = journal.lock(key.saga_id)
        journal.arrive(key.saga_id, join.name, delivery.envelope)
        arrived = journal.arrivals(key.saga_id, join.name)
        if journal.find(key) is not None or not arrived:
            return
        if len(arrived) < len(join.on) and not row.state.aborted:
            return
        arguments = tuple(runtime.read(next(iter(arrived.values()))) for _ in join.on)
        perform(runtime, journal, join, Run(row, key, None, delivery.envelope, arguments))

    return _with_handler("run_join", run_join)


class _Blind(SqlJournal):
    """A journal that sees every saga running, and moves it from wherever it stands."""

    def lock(self, saga_id: UUID) -> SagaRow:
        return replace(super().lock(saga_id), state=SagaState.RUNNING)

    def lock_known(self, saga_id: UUID) -> SagaRow | None:
        row = super().lock_known(saga_id)
        return None if row is None else replace(row, state=SagaState.RUNNING)

    def move(self, saga: SagaRow, state: SagaState, *, stuck: bool, reason: str | None) -> SagaRow:
        from_anywhere = _MOVE_SAGA.replace("AND state = %s", "")
        key = (saga.saga_id, self._participant)
        assert self._rows(from_anywhere, state.value, stuck, reason, *key)
        return replace(saga, state=state, stuck=stuck, reason=reason)


def deadline_ignoring_state() -> AbstractContextManager[Any]:
    """A deadline aborts what is decided."""

    def run(runtime: Any, deadline: Any, delivery: Any, session: Any) -> None:
        blind = replace(runtime, open_journal=lambda one: _Blind(one, runtime.participant))
        run_deadline(blind, deadline, delivery, session)

    return _with_handler("run_deadline", run)


def no_row_lock_on_the_saga() -> AbstractContextManager[Any]:
    """Two operations on one saga read its state at the same time."""
    return patch.object(saga.store, "_LOCK_SAGA", saga.store._LOCK_SAGA.replace("FOR UPDATE", ""))


@contextmanager
def cursor_moved_before_the_confirm() -> Iterator[None]:
    """The relay moves its cursor, then sends."""

    def relay(self: Node) -> None:
        page = self.unsent()
        self.sent.update(row["position"] for row in page)
        for row in page:
            self.world.hub.stop_at("relay.cursor moved")
            self.world.publish(
                Message(row["type"], row["event_id"], row["body"], key_seq=row["key_seq"])
            )

    with patch.object(Node, "relay", relay):
        yield


@contextmanager
def publish_after_commit() -> Iterator[None]:
    """Events are written in a transaction of their own, after the one that they belong to."""
    real_commit, real_append = DeliverySession.commit_delivery, SqlJournal.append

    def append(self: SqlJournal, envelope: Any, event_type: Any) -> None:
        if isinstance(self.session, DeliverySession):
            self.session.info.setdefault("late", []).append((envelope, event_type))
        else:
            real_append(self, envelope, event_type)

    def commit_delivery(self: DeliverySession) -> None:
        bind = self.get_bind().engine
        real_commit(self)
        late = self.info.pop("late", [])
        if late:
            with Session(bind) as session, session.begin():
                for envelope, event_type in late:
                    saga.store.append(session, envelope, event_type)

    with (
        patch.object(SqlJournal, "append", append),
        patch.object(DeliverySession, "commit_delivery", commit_delivery),
    ):
        yield


@contextmanager
def early_ack() -> Iterator[None]:
    """A message is acked when it is taken, not when it is settled."""

    def receive(self: Node, message: Message) -> None:
        self.world.acked(self, message)
        self.world.hub.stop_at("acked")
        self.receiver.receive(
            message.body, handler=message.handler, redelivered=message.redelivered
        )

    with patch.object(Node, "receive", receive):
        yield


def empty_compensation_unguarded() -> AbstractContextManager[Any]:
    """A step that never ran is compensated all the same when its trigger comes."""

    def run_step(runtime: Any, step: Any, delivery: Any, session: Any) -> None:
        journal = runtime.open_journal(session)
        aborted = journal.lock(saga_id_of(delivery)).state.aborted
        never_ran = (
            journal.find(RunKey(saga_id_of(delivery), step.name, delivery.envelope.id)) is None
        )
        saga.step.run_step(runtime, step, delivery, session)
        if aborted and never_ran and step.undo is not None:
            points = type("Emitted", (), {"points": 1})()
            step.undo(delivery.event, points, session)

    return _with_handler("run_step", run_step)


def batch_without_row_locks() -> AbstractContextManager[Any]:
    """A batch reads where its sagas stand, and does not keep others from moving them."""
    unlocked = saga.remembered._LOCK_SAGAS.replace("ORDER BY saga_id FOR UPDATE", "")
    return patch.object(saga.remembered, "_LOCK_SAGAS", unlocked)


def inbox_of_a_batch_ignored() -> AbstractContextManager[Any]:
    """A batch runs all that it was given, whatever its insert into the inbox has left out."""
    real = Batch._enter

    def enter(batch: Batch, session: Session) -> Any:
        real(batch, session)
        return {work.pair for plan in batch._plans.values() for work in plan.works}

    return patch.object(Batch, "_enter", enter)


MUTANTS: dict[str, Mutant] = {
    "tombstone_dropped": tombstone_dropped,
    "inbox_check_skipped": inbox_check_skipped,
    "inbox_in_its_own_transaction": inbox_in_its_own_transaction,
    "join_counted_twice": join_counted_twice,
    "join_after_abort": join_after_abort,
    "no_row_lock_on_the_saga": no_row_lock_on_the_saga,
    "cursor_moved_before_the_confirm": cursor_moved_before_the_confirm,
    "publish_after_commit": publish_after_commit,
    "early_ack": early_ack,
    "empty_compensation_unguarded": empty_compensation_unguarded,
}
BATCH_MUTANTS: dict[str, Mutant] = {"inbox_of_a_batch_ignored": inbox_of_a_batch_ignored}
"""Those that only workers that take batches can show."""
TRIP_BATCH_MUTANTS: dict[str, Mutant] = {"batch_without_row_locks": batch_without_row_locks}
TRIP_MUTANTS: dict[str, Mutant] = {"deadline_ignoring_state": deadline_ignoring_state}
"""Those that need what the order example does not have."""
