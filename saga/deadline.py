"""Deadlines: a saga that is not decided in time is aborted.

A deadline is owed in the transaction that it counts from (a start, or a step's run), as a delivery
of the same event to the deadline's own handler that is due later. So there is a deadline exactly if
that transaction committed, any live worker fires it, and it is tried again as any delivery is.

Why exactly one of deadline and decision wins: both lock the saga's row on this participant first. A
deadline that finds the saga decided or aborted does nothing; one that finds it running aborts it in
the commit that holds the lock, and the decision then finds it aborted. That is the reason why a
deadline belongs to the participant that holds the pivot or the completing join (`saga check`).

The row is there, as the transaction that owed the deadline wrote it. Where it is not, somebody has
deleted the saga, decided or not: what is not known to be running is not aborted, because it may be
completed, and *completed* is never taken back.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from outbox.service import Delivery
from saga.declaration import Deadline
from saga.journal import RunKey, SagaState, StepState
from saga.reaction import Reject
from saga.runtime import Runtime, log, saga_id_of
from saga.step import Run, reject


def run_deadline(
    runtime: Runtime, deadline: Deadline[..., Any], delivery: Delivery, session: Session
) -> None:
    """The time has come: abort the saga unless it is decided."""
    journal = runtime.open_journal(session)
    key = RunKey(saga_id_of(delivery), deadline.name, delivery.envelope.id)
    saga = journal.lock_known(key.saga_id)
    if saga is None:
        log.warning(
            "deadline %s of saga %s has passed, which is not known any more", key.step, key.saga_id
        )
        return
    before = journal.find(key)
    if saga.state is not SagaState.RUNNING or before not in (None, StepState.STUCK):
        return
    with runtime.working(key):
        event = deadline.function(delivery.event, session)
        journal.flush()
    run = Run(saga, key, before, delivery.envelope, (delivery.event,))
    reject(runtime, journal, deadline, run, Reject(event, reason=f"{deadline.name} has passed"))
