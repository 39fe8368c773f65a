"""Unwinding: what an abort makes of one participant's part in a saga, until nothing of it is left.

An abort turns every step that was done here into durable work: a delivery of its own to the step's
compensation (Garcia-Molina & Salem 1987), with its own transaction, attempts and dead letter. So
one compensation that fails or hangs stops no other. All of them are due at once (eager unwinding);
an order between them needs only a later due time, as nothing else depends on when they run.

Why nothing is left, and nothing is undone twice: the abort holds the saga's lock, sees every step
that was ever done here (see `saga.step`), and no further one will run. Each run it finds moves from
*done* to *compensating* in the commit that also owes the delivery. The compensation locks the run's
row, so a second delivery waits, then finds it *compensated*. Only at its end does it lock the saga,
to see whether it was the last: the one that comes second sees the first one's commit, hence exactly
one finds nothing left. Locks are always taken run first, saga second here, and an abort never
touches a run that is compensating, so the two cannot deadlock.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from outbox.envelope import Envelope
from outbox.service import Delivery
from saga.context import CurrentSaga, working_for
from saga.control import CompensationDue, OwedCompensation, SagaStuck, SagaUndone
from saga.declaration import Reaction
from saga.errors import NoCompensation, SagaError
from saga.journal import ClaimedRun, Journal, RunKey, SagaRow, SagaState, StepRow, StepState
from saga.runtime import Runtime, described


def unwind(
    runtime: Runtime, journal: Journal, saga: SagaRow, *, reason: str, cause: Envelope
) -> None:
    """Seal a running saga here: call off what is stuck, and owe the compensation of what was done."""
    owes = stuck = False
    for run in [] if saga.new else journal.runs(saga.saga_id):
        if run.state is StepState.STUCK:
            journal.advance(run.key, run.state, StepState.SKIPPED, reason="aborted while stuck")
        elif run.state is StepState.DONE:
            owes |= _owe_compensation(runtime, journal, run, cause)
        elif run.state.is_uncertain:
            # Its delivery is owed, and will say whether there is something to undo (`external`).
            owes = True
            stuck |= run.state.waits_for_a_person
    state = SagaState.COMPENSATING if owes else SagaState.COMPENSATED
    journal.move(saga, state, stuck=stuck, reason=reason)
    if not owes:
        runtime.publish(journal, SagaUndone(saga.saga_id, runtime.participant), saga.saga_id, cause)


def _owe_compensation(runtime: Runtime, journal: Journal, run: StepRow, cause: Envelope) -> bool:
    reaction = runtime.reactions.get(run.key.step)
    if reaction is not None and reaction.nothing_to_undo is not None:
        journal.advance(run.key, run.state, StepState.COMPENSATED, reason=reaction.nothing_to_undo)
        return False
    journal.advance(run.key, run.state, StepState.COMPENSATING)
    owe_compensation(runtime, journal, run.key, cause)
    return True


def owe_compensation(runtime: Runtime, journal: Journal, key: RunKey, cause: Envelope) -> None:
    """Owe a run that is compensating the delivery that undoes it."""
    due = CompensationDue(key.saga_id, key.step, key.trigger_id)
    # Also for a step that this deployment does not know: its delivery waits for one that does.
    journal.schedule(
        runtime.compensation_handler(key.step), runtime.envelope(due, key.saga_id, cause)
    )


def compensate(
    runtime: Runtime, reaction: Reaction[..., Any], delivery: Delivery, session: Session
) -> None:
    """Undo one run of *reaction*. Raises what the user's function raises; then it is tried again."""
    journal = runtime.open_journal(session)
    key = _due(runtime, delivery)
    run = journal.claim(key)
    if run is None:
        raise SagaError(f"{key} is to be compensated and is not in the journal any more")
    if not run.state.owes_compensation:
        return
    _undo(runtime, journal, reaction, run)
    saga = journal.lock(key.saga_id)
    journal.advance(key, run.state, StepState.COMPENSATED)
    close(runtime, journal, saga, delivery.envelope)


def count_as_undone(runtime: Runtime, session: Session, key: RunKey, reason: str) -> bool:
    """End a run that owes its compensation without calling it; False where it owes none any more."""
    journal = runtime.open_journal(session)
    run = journal.claim(key)
    if run is None or not run.state.owes_compensation:
        return False
    saga = journal.lock(key.saga_id)
    journal.advance(key, run.state, StepState.COMPENSATED, reason=reason)
    close(runtime, journal, saga, None)
    return True


def _undo(
    runtime: Runtime, journal: Journal, reaction: Reaction[..., Any], run: ClaimedRun
) -> None:
    if reaction.undo is None:
        if reaction.nothing_to_undo is None:
            raise NoCompensation(
                f"{reaction} ({reaction.place}) was done and must be undone, and has no "
                'compensation: write one, or say nothing_to_undo="why"; deploy, then redrive'
            )
        return
    key = run.key
    working = CurrentSaga(
        key.saga_id, runtime.participant, key.step, key.trigger_id, compensating=True
    )
    arguments = [*_triggers(runtime, journal, reaction, run)]
    if run.emitted is not None:
        arguments.append(runtime.read(run.emitted))
    with working_for(working):
        reaction.undo(*arguments, journal.session)
        journal.flush()


def _triggers(
    runtime: Runtime, journal: Journal, reaction: Reaction[..., Any], run: ClaimedRun
) -> list[object]:
    if len(reaction.on) == 1:
        return [runtime.read(run.trigger)]
    arrived = journal.arrivals(run.key.saga_id, run.key.step)
    return [runtime.read(arrived[event_type.name]) for event_type in reaction.on]


def close(runtime: Runtime, journal: Journal, saga: SagaRow, cause: Envelope | None) -> None:
    """Say how much is left to undo here, and end the saga where that is nothing."""
    runs = journal.runs(saga.saga_id)
    owed = [run.key for run in runs if run.state.owes_compensation or run.state.is_uncertain]
    journal.move(
        saga,
        saga.state if owed else SagaState.COMPENSATED,
        stuck=any(run.state.waits_for_a_person for run in runs),
        reason=saga.reason,
    )
    pending = tuple(OwedCompensation(key.step, key.trigger_id) for key in owed)
    undone = SagaUndone(saga.saga_id, runtime.participant, pending)
    runtime.publish(journal, undone, saga.saga_id, cause)


def park_compensation(
    runtime: Runtime,
    reaction: Reaction[..., Any],
    delivery: Delivery,
    session: Session,
    error: BaseException,
) -> None:
    """A compensation's attempts are used up: show the saga as stuck. The redrive of its dead letter
    resumes it."""
    journal = runtime.open_journal(session)
    key = _due(runtime, delivery)
    run = journal.claim(key)
    if run is None or not run.state.owes_compensation:
        return
    saga = journal.lock(key.saga_id)
    journal.advance(key, run.state, StepState.COMPENSATION_STUCK, reason=described(error))
    journal.move(saga, saga.state, stuck=True, reason=saga.reason)
    stuck = SagaStuck(key.saga_id, runtime.participant, reaction.name, type(error).__name__)
    runtime.publish(journal, stuck, key.saga_id, delivery.envelope)


def _due(runtime: Runtime, delivery: Delivery) -> RunKey:
    # Not `delivery.event`, which a delivery that is parked unread does not have.
    due: CompensationDue = runtime.read(delivery.envelope.body)
    return RunKey(due.saga_id, due.step, due.trigger_id)
