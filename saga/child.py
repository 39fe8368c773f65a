"""Child sagas: a step that starts another saga and is done once that one is completed.

The step's transaction opens the child, whose id is made of the run's, and leaves the run as *calling*,
as a call outside does: nobody knows yet what comes of it. The child's decision, heard as any
participant hears it, ends the run: completed, the run is done and emits its event; aborted, it
rejects. A saga always ends, so no run waits for ever.

Why nothing is left whichever comes first, the end of the child or an abort of the parent: both take
the parent's row lock. An abort that finds the run *calling* waits for the child's decision (see
`StepState.is_uncertain`): a completed child is then undone by the step's compensation, an aborted one
undoes itself. The run moves on from *calling* once, so a second decision or a duplicate finds it
moved. No decision is missed: the run is committed together with the child's opening, hence before
anyone could decide the child.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid5

from sqlalchemy.orm import Session

from outbox.service import Delivery
from saga.context import Emission
from saga.control import COMPLETED
from saga.declaration import ChildSaga
from saga.errors import UndeclaredEvent
from saga.external import Answer, end_in_an_aborted_saga
from saga.journal import Journal, RunKey, SagaState, StepState
from saga.reaction import Reject
from saga.runtime import Runtime, reset_stuck, saga_id_of
from saga.start import start
from saga.step import Run, finish, perform, reject, skip


def run_child(
    runtime: Runtime, step: ChildSaga[..., Any], delivery: Delivery, session: Session
) -> None:
    """Handle the event that triggers *step*: open the child saga, unless the step rejects."""
    journal = runtime.open_journal(session)
    trigger = delivery.envelope
    key = RunKey(saga_id_of(delivery), step.name, trigger.id)
    saga = journal.lock(key.saga_id)
    before = None if saga.new else journal.find(key)
    if before not in (None, StepState.STUCK):
        return
    if saga.state.aborted:
        skip(journal, key, trigger, saga)
        return
    step.refuse_what_is_missing()
    run = Run(saga, key, before, trigger, (delivery.event,))
    perform(runtime, journal, step, run, then=_open_child)


def _open_child(
    runtime: Runtime,
    journal: Journal,
    step: ChildSaga[..., Any],
    run: Run,
    first: object,
    _published: list[Emission],
) -> None:
    if type(first) is not step.opens.payload_class:
        raise UndeclaredEvent(
            f"{step} returned {type(first).__name__}; it declares opens="
            f"{step.opens.payload_class.__name__} ({step.place})"
        )
    child_id = child_of(runtime, run.key)
    start(runtime, journal.session, first, child_id)
    journal.record(run.key, run.before, StepState.CALLING, trigger=run.trigger.body)
    journal.adopt(child_id, run.key)
    if run.saga.stuck:
        reset_stuck(journal, run.saga)


def child_of(runtime: Runtime, key: RunKey) -> UUID:
    """The id of the saga that a run opens: the same however often it is tried."""
    return uuid5(key.saga_id, f"{runtime.participant}.{key.step}/{key.trigger_id}")


def hear_of_child(
    runtime: Runtime, step: ChildSaga[..., Any], delivery: Delivery, session: Session
) -> None:
    """Handle the decision of a saga: where it is a child of *step*, its run is over."""
    journal = runtime.open_journal(session)
    key = journal.parent(delivery.event.saga_id)
    if key is None or key.step != step.name:
        return
    saga = journal.lock(key.saga_id)
    if journal.find(key) is not StepState.CALLING:
        return
    claimed = journal.claim(key)
    assert claimed is not None
    completed = delivery.envelope.type == COMPLETED.name
    trigger, event = runtime.read_with_envelope(claimed.trigger)
    run = Run(saga, key, StepState.CALLING, trigger, (event,))
    answer = _answer(runtime, step, journal, run, completed=completed)
    if saga.state.aborted:
        end_in_an_aborted_saga(runtime, journal, run, answer)
    elif answer.rejection is not None and saga.state is SagaState.RUNNING:
        reject(runtime, journal, step, run, answer.rejection)
    else:
        finish(runtime, journal, step, run, answer.event, [])


def _answer(
    runtime: Runtime,
    step: ChildSaga[..., Any],
    journal: Journal,
    run: Run,
    *,
    completed: bool,
) -> Answer:
    function = step.on_completed if completed else step.on_aborted
    assert function is not None
    with runtime.working(run.key):
        event = function(*run.arguments, journal.session)
        journal.flush()
    if completed:
        return Answer(event)
    reason = f"the saga that {step.name} started was aborted"
    return Answer(rejection=Reject(event, reason=reason), took_effect=False)
