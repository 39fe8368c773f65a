"""Running a step: one local transaction, with three possible outcomes.

*Done*: the step's writes, its journal row and the event that it emits are committed together.
*Rejected* (only ever by `Reject`): its writes are rolled back to a savepoint; the journal row, the
rejection and the abort of the saga are committed together. *Unknown* (any other exception): nothing
is committed; the delivery is tried again and, past its limit, parked, with the saga shown as stuck.

Why it holds in every interleaving with an abort (the hanging step and the empty compensation of
dtm's barrier): both lock the saga's row first. If the abort's transaction is first, the step finds
the saga aborted (by a tombstone, where nothing was known of it before) and does nothing. If the
step's is first, the abort finds its journal row, because that was committed before the abort got
the lock, and has it compensated; if the step's rolls back, the abort finds nothing to undo and
leaves the tombstone. A duplicate finds the journal row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.envelope import Envelope
from outbox.service import Delivery
from saga.context import Emission
from saga.control import SagaAborted, SagaCompleted, SagaStuck
from saga.declaration import Step
from saga.errors import SagaDecided, Unknown
from saga.journal import Journal, RunKey, SagaRow, SagaState, StepState
from saga.reaction import Reaction, Reject
from saga.runtime import (
    Runtime,
    described,
    known_saga_id_of,
    log,
    reset_stuck,
    saga_id_of,
    shortened,
)
from saga.unwinding import unwind

R_ = TypeVar("R_", bound=Reaction[..., Any])


@dataclass(frozen=True)
class Run:
    """One run of a step or a join, its saga locked, about to be made."""

    saga: SagaRow
    key: RunKey
    before: StepState | None
    trigger: Envelope
    arguments: tuple[object, ...]


def run_step(runtime: Runtime, step: Step[..., Any], delivery: Delivery, session: Session) -> None:
    """Handle the event that triggers *step*."""
    journal = runtime.open_journal(session)
    trigger = delivery.envelope
    key = RunKey(saga_id_of(delivery), step.name_in(delivery.handler), trigger.id)
    saga = journal.lock(key.saga_id)
    before = None if saga.new else journal.find(key)
    key = journal.known_as(key)
    if before is not None and before.is_uncertain:
        raise Unknown(
            f"{key} was called while {step} was declared external, and nothing is known of the "
            f"result: declare it so again ({step.place}), or `saga resolve`"
        )
    if before not in (None, StepState.STUCK):
        return
    if saga.state.aborted or (step.completes and saga.state is SagaState.COMPLETED):
        skip(journal, key, trigger, saga)
        return
    perform(runtime, journal, step, Run(saga, key, before, trigger, (delivery.event,)))


def put_off(runtime: Runtime, step: Step[..., Any], delivery: Delivery, session: Session) -> None:
    """Handle the event that triggers a delayed step: owe its run, which looks at the saga then.

    The step's time counts from here. It is a delivery of the same event to another handler.
    """
    assert step.delay is not None
    journal = runtime.open_journal(session)
    saga_id_of(delivery)
    handler = runtime.delayed_handler(step.name)
    journal.schedule(handler, delivery.envelope, delay=step.delay)


def skip(journal: Journal, key: RunKey, trigger: Envelope, saga: SagaRow) -> None:
    """Record that a run will never be made. (A stuck one was skipped by the abort itself.)"""
    log.info("%s does not run: the saga is %s", key, saga.state)
    reason = f"the saga was {saga.state} when the event came"
    journal.record(key, None, StepState.SKIPPED, trigger=trigger.body, reason=reason)


def perform(
    runtime: Runtime,
    journal: Journal,
    reaction: R_,
    run: Run,
    then: Callable[[Runtime, Journal, R_, Run, Any, list[Emission]], None] | None = None,
) -> None:
    """Call the user's function and write down what came of it. Raises what leaves it unknown.

    *then* takes an answer that is no rejection; by default `finish`.
    """
    # Only who may reject pays for the savepoint: any other exception takes back the transaction.
    savepoint = journal.savepoint() if reaction.rejects else nullcontext()
    try:
        with runtime.working(run.key) as working, savepoint:
            answer = reaction.function(*run.arguments, journal.session)
            journal.flush()
    except Reject as rejection:
        reject(runtime, journal, reaction, run, rejection)
    else:
        (then or finish)(runtime, journal, reaction, run, answer, working.published)


def finish(
    runtime: Runtime,
    journal: Journal,
    reaction: Reaction[..., Any],
    run: Run,
    answer: object,
    published: list[Emission],
) -> None:
    reaction.check_answer(answer)
    emitted = None
    if answer is not None:
        emitted = runtime.publish(journal, answer, run.key.saga_id, run.trigger)
        published.append(Emission(emitted.id, emitted.type))
    journal.record(
        run.key,
        run.before,
        StepState.DONE,
        trigger=run.trigger.body,
        emitted=None if emitted is None else emitted.body,
        published=published,
    )
    if reaction.deadlines:
        runtime.set_deadlines(journal, reaction, run.arguments[0], run.trigger)
    saga = run.saga
    if saga.stuck and run.before is not None:
        saga = reset_stuck(journal, saga)
    if reaction.completes:
        journal.move(saga, SagaState.COMPLETED, stuck=saga.stuck, reason=saga.reason)
        completed = SagaCompleted(saga.saga_id, runtime.participant, reaction.name)
        runtime.publish(journal, completed, saga.saga_id, run.trigger)


def reject(
    runtime: Runtime, journal: Journal, reaction: Reaction[..., Any], run: Run, rejection: Reject
) -> None:
    reaction.check_rejection(rejection.event)
    if run.saga.state is not SagaState.RUNNING:
        raise SagaDecided(
            f"{reaction} rejected after saga {run.key.saga_id} was {run.saga.state}: the completing "
            f"join must wait for this step, or the step must not reject ({reaction.place})"
        ) from rejection
    reason = shortened(rejection.reason or runtime.registry.of(rejection.event).name)
    event = runtime.publish(journal, rejection.event, run.key.saga_id, run.trigger)
    journal.record(
        run.key,
        run.before,
        StepState.REJECTED,
        trigger=run.trigger.body,
        emitted=event.body,
        reason=reason,
    )
    decide_to_abort(runtime, journal, run.saga, reaction.name, reason, run.trigger, event.id)


def decide_to_abort(
    runtime: Runtime,
    journal: Journal,
    saga: SagaRow,
    step: str,
    reason: str,
    trigger: Envelope | None,
    rejection_id: UUID | None = None,
) -> None:
    """Abort a running saga, here and (in the same commit) for everyone."""
    aborted = SagaAborted(saga.saga_id, runtime.participant, step, reason, rejection_id)
    cause = runtime.publish(journal, aborted, saga.saga_id, trigger)
    unwind(runtime, journal, saga, reason=f"{runtime.participant}.{step}: {reason}", cause=cause)


def park_step(
    runtime: Runtime,
    step: Reaction[..., Any],
    delivery: Delivery,
    session: Session,
    error: BaseException,
) -> None:
    """A step's attempts are used up."""
    trigger = delivery.envelope
    saga_id = known_saga_id_of(delivery)
    if saga_id is None:
        return
    key = RunKey(saga_id, step.name_in(delivery.handler), trigger.id)
    park(runtime, runtime.open_journal(session), step, key, trigger, error)


def park(
    runtime: Runtime,
    journal: Journal,
    reaction: Reaction[..., Any],
    key: RunKey,
    trigger: Envelope,
    error: BaseException,
) -> None:
    """Show the saga as stuck in this run, or abort it where that was asked for.

    Runs in the transaction that parks the delivery as a dead letter. Under the saga's lock the
    journal tells whether the run was made or called off meanwhile; then there is nothing to say.
    """
    saga = journal.lock(key.saga_id)
    before = None if saga.new else journal.find(key)
    if before is not None and _only_a_person_knows(before, saga):
        _show_as_stuck(runtime, journal, saga, key, before, StepState.UNRESOLVED, trigger, error)
        return
    if before not in (None, StepState.STUCK):
        return
    if saga.state.aborted:
        skip(journal, key, trigger, saga)
        return
    reason = described(error)
    if reaction.exhausted == "abort" and saga.state is SagaState.RUNNING:
        journal.record(key, before, StepState.REJECTED, trigger=trigger.body, reason=reason)
        decide_to_abort(runtime, journal, saga, reaction.name, "gave up", trigger)
        return
    _show_as_stuck(runtime, journal, saga, key, before, StepState.STUCK, trigger, error)


def _only_a_person_knows(before: StepState, saga: SagaRow) -> bool:
    """Whether a run has called outside (see `saga.external`), so that nobody may take it for empty."""
    return before.is_uncertain or (before is StepState.NOT_HAPPENED and not saga.state.aborted)


def _show_as_stuck(
    runtime: Runtime,
    journal: Journal,
    saga: SagaRow,
    key: RunKey,
    before: StepState | None,
    after: StepState,
    trigger: Envelope,
    error: BaseException,
) -> None:
    journal.record(key, before, after, trigger=trigger.body, reason=described(error))
    journal.move(saga, saga.state, stuck=True, reason=saga.reason)
    stuck = SagaStuck(key.saga_id, runtime.participant, key.step, type(error).__name__)
    runtime.publish(journal, stuck, key.saga_id, trigger)
