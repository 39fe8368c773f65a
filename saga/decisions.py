"""What one participant decided or has undone, as the others hear of it.

Whichever order these events, a step's trigger and each other's duplicates come in, the saga's row
is locked first and what it says decides; so on one participant they happen one after the other.

A saga has one point of decision, so an abort and a completion of the same saga cannot both be
published by a choreography that `saga check` accepts: whoever can abort is either upstream of the
deciding commit, or takes the same row lock. Where both are heard all the same, a completed saga
stays completed, and an aborted one calls for a person, as the participants now differ.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from outbox.service import Delivery
from saga.control import SagaAborted, SagaCompleted, SagaStuck, SagaUndone
from saga.journal import Journal, RunKey, SagaRow, SagaState, StepState
from saga.runtime import Runtime, described, known_saga_id_of, log, reset_stuck
from saga.unwinding import hear_undone, unwind


def on_aborted(runtime: Runtime, delivery: Delivery, session: Session) -> None:
    """Undo this participant's part. A decided saga goes on; one already aborted stays as it is."""
    aborted: SagaAborted = delivery.event
    journal = runtime.open_journal(session)
    saga = _resumed(journal, journal.lock(aborted.saga_id), delivery)
    if saga.state is SagaState.RUNNING:
        reason = f"{aborted.participant}.{aborted.step}: {aborted.reason}"
        unwind(runtime, journal, saga, reason=reason, cause=delivery.envelope)
    elif saga.state is SagaState.COMPLETED:
        log.warning(
            "saga %s is completed, so its abort by %s.%s is not heard: the decision holds. Its "
            "choreography lets a step reject that the decision does not wait for (saga check)",
            saga.saga_id, aborted.participant, aborted.step,
        )  # fmt: skip


def on_completed(runtime: Runtime, delivery: Delivery, session: Session) -> None:
    """Note that the saga goes forward from here."""
    completed: SagaCompleted = delivery.event
    journal = runtime.open_journal(session)
    saga = journal.lock(completed.saga_id)
    if saga.state.aborted:
        _call_for_a_person(runtime, journal, saga, delivery)
        return
    saga = _resumed(journal, saga, delivery)
    if saga.state is SagaState.RUNNING:
        journal.move(saga, SagaState.COMPLETED, stuck=saga.stuck, reason=saga.reason)


def on_undone(runtime: Runtime, delivery: Delivery, session: Session) -> None:
    """Note what another participant has undone: steps here may have waited for that."""
    undone: SagaUndone = delivery.event
    if undone.participant == runtime.participant:
        return
    journal = runtime.open_journal(session)
    saga = _resumed(journal, journal.lock(undone.saga_id), delivery)
    hear_undone(runtime, journal, saga, undone, delivery.envelope)


def park_decision(
    runtime: Runtime, delivery: Delivery, session: Session, error: BaseException
) -> None:
    """A decision could not be noted, in all its attempts: show the saga as stuck."""
    saga_id = known_saga_id_of(delivery)
    if saga_id is None:
        return
    journal = runtime.open_journal(session)
    saga = journal.lock(saga_id)
    _record_stuck(runtime, journal, saga, delivery, described(error), type(error).__name__)


def _call_for_a_person(
    runtime: Runtime, journal: Journal, saga: SagaRow, delivery: Delivery
) -> None:
    completed: SagaCompleted = delivery.event
    reason = (
        f"completed by {completed.participant}.{completed.step} after it was aborted here: the "
        "choreography has more than one point of decision (saga check)"
    )
    log.error("saga %s was %s", saga.saga_id, reason)
    _record_stuck(runtime, journal, saga, delivery, reason, "TwoDecisions")


def _record_stuck(
    runtime: Runtime,
    journal: Journal,
    saga: SagaRow,
    delivery: Delivery,
    reason: str,
    error: str,
) -> None:
    key = _key(saga, delivery)
    before = journal.find(key)
    if before not in (None, StepState.STUCK):
        return
    body = delivery.envelope.body
    journal.record(key, before, StepState.STUCK, trigger=body, reason=reason)
    journal.move(saga, saga.state, stuck=True, reason=saga.reason)
    stuck = SagaStuck(saga.saga_id, runtime.participant, key.step, error)
    runtime.publish(journal, stuck, saga.saga_id, delivery.envelope)


def _resumed(journal: Journal, saga: SagaRow, delivery: Delivery) -> SagaRow:
    key = _key(saga, delivery)
    if not saga.stuck or journal.find(key) is not StepState.STUCK:
        return saga
    body = delivery.envelope.body
    journal.record(key, StepState.STUCK, StepState.SKIPPED, trigger=body, reason="redriven")
    return reset_stuck(journal, saga)


def _key(saga: SagaRow, delivery: Delivery) -> RunKey:
    """A decision stands in the journal only where it could not be heeded."""
    return RunKey(saga.saga_id, delivery.envelope.type, delivery.envelope.id)
