"""Joins: one local transaction in answer to several events of a saga, once enough of them are there.

Why it fires exactly once, in any order, and never after an abort: each arrival locks the saga's row
before it writes itself down and counts. So arrivals come one after the other, each sees all earlier
ones, and the one that completes the set, whichever it is, finds no row of the join in the journal;
every later one finds it. An abort takes the same lock: after it, the state says so. Without the
lock, two last arrivals at once would each miss the other's uncommitted row, and none would fire.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.service import Delivery
from saga.declaration import Join
from saga.journal import RunKey, SagaState, StepState
from saga.runtime import Runtime, known_saga_id_of, log, saga_id_of
from saga.step import Run, park, perform, skip


def run_join(runtime: Runtime, join: Join[..., Any], delivery: Delivery, session: Session) -> None:
    """Handle one of the events that *join* waits for."""
    journal = runtime.open_journal(session)
    event = delivery.envelope
    key = join_key(join.name, saga_id_of(delivery))
    saga = journal.lock(key.saga_id)
    before = None if saga.new else journal.find(key)
    key = journal.known_as(key)
    if before not in (None, StepState.STUCK):
        return
    # Not after the run: its compensation gets what the run got, and no more.
    journal.arrive(key.saga_id, join.name, event)
    if saga.state.aborted:
        log.info("join %s keeps %s of an aborted saga unused", key, event.type)
        return
    arrived = journal.arrivals(key.saga_id, join.name)
    if sum(event_type.name in arrived for event_type in join.on) < join.needs:
        return
    if join.completes and saga.state is SagaState.COMPLETED:
        skip(journal, key, event, saga)
        return
    arguments = runtime.arguments(join, arrived)
    perform(runtime, journal, join, Run(saga, key, before, event, arguments))


def park_join(
    runtime: Runtime,
    join: Join[..., Any],
    delivery: Delivery,
    session: Session,
    error: BaseException,
) -> None:
    """A join's attempts are used up. The arrival is kept, so that it shows what the join has."""
    saga_id = known_saga_id_of(delivery)
    if saga_id is None:
        return
    journal = runtime.open_journal(session)
    key = join_key(join.name, saga_id)
    park(runtime, journal, join, key, delivery.envelope, error)
    journal.arrive(key.saga_id, join.name, delivery.envelope)


def join_key(join: str, saga_id: UUID) -> RunKey:
    """A join runs once per saga, so the saga itself stands for its trigger."""
    return RunKey(saga_id, join, saga_id)
