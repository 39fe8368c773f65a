"""What a person does to a saga that does not go on by itself: resume, abort, skip, resolve.

Each verb is one transaction on one participant's database. Why it is safe while workers go on:

- It locks the saga's row (a skip: the run's row, then the saga's, as a compensation does) and only
  then looks. So it comes wholly before or wholly after whatever a worker does to the saga: a step
  that was committed before is seen and undone, one that comes after finds the saga aborted.
- A compensation is skipped by the very moves with which a worker ends one, so the saga ends by the
  same rule, and a worker that comes second finds the run compensated and calls nothing.
- What is owed or parked for a skipped run leaves in the same transaction. A worker that parks at
  that moment holds those rows and waits for the run: PostgreSQL calls this a deadlock and ends one
  of the two, which does its part again (`Transactions.retried`) and meets what the other has done.
- `resume` gives back only what it finds parked, by the same rows as `outbox dead redrive`, so of
  the two the second finds nothing. A run that is stuck with nothing parked (somebody discarded its
  dead letter) is owed again from the journal.

Who did what, and why, is kept in `saga_intervention` in the same commit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.sql import DEFAULT_SCHEMA
from saga.case import Case, Operator, Resumed, owes
from saga.errors import Refused
from saga.journal import RunKey, SagaRow, SagaState, StepState
from saga.runtime import reset_stuck, shortened
from saga.step import decide_to_abort
from saga.unwinding import count_as_undone, go_on

__all__ = ["Operator", "Resumed", "abort", "resolve", "resume", "skip_compensation"]


def resume(
    session: Session,
    saga_id: UUID,
    operator: Operator,
    *,
    participant: str | None = None,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[Resumed]:
    """Give everything that is stuck here another try, with all its attempts before it.

    Empty where nothing is stuck. Raises `Refused` where nobody here has heard of the saga.
    """
    case = Case(session, saga_id, schema)
    case.lock(participant)
    resumed = [case.give_back(run) for run in case.runs(participant) if _is_stuck(run)]
    for one in resumed:
        case.record(one.participant, "resume", operator, step=one.step)
    return resumed


def abort(
    session: Session,
    saga_id: UUID,
    operator: Operator,
    *,
    participant: str | None = None,
    force: bool = False,
    schema: str = DEFAULT_SCHEMA,
) -> str:
    """Abort a running saga for everyone; returns the participant that did it.

    Only where it is decided: there the decision and the abort exclude each other. *force* aborts it
    elsewhere, where it may meet a completion; the participants then differ and a person has to
    settle it. Raises `Refused`, with the reason.
    """
    case = Case(session, saga_id, schema)
    rows = case.lock(participant)
    row = next((row for row in rows if row.decides), rows[0])
    state = SagaState(row.state)
    if state is not SagaState.RUNNING:
        raise Refused(f"saga {saga_id} is {state} at {row.participant}: {_why_not_aborted(state)}")
    if not row.decides and not force:
        raise Refused(
            f"{row.participant} does not decide saga {saga_id}: it could be completed elsewhere at "
            "this moment, and be completed and aborted. Abort it where its completing join is; "
            "--force if it has none, or if you know that this join can never fire"
        )
    runtime = case.runtime(row.participant)
    case.record(row.participant, "abort", operator)
    decide_to_abort(
        runtime,
        runtime.open_journal(session),
        SagaRow(saga_id, state, row.stuck, row.reason),
        "abort",
        shortened(f"{operator.reason} ({operator.name})"),
        None,
    )
    return str(row.participant)


def skip_compensation(
    session: Session,
    saga_id: UUID,
    step: str,
    operator: Operator,
    *,
    participant: str | None = None,
    trigger_id: UUID | None = None,
    schema: str = DEFAULT_SCHEMA,
) -> RunKey:
    """Count a run that owes its compensation as undone, without calling anything; returns its key.

    *step* is its name, or `participant.step`. Raises `Refused`, with the reason: no such run, none
    that owes a compensation, or more than one (give *trigger_id*).
    """
    case = Case(session, saga_id, schema)
    run = case.the_run(step, participant, trigger_id, owes, "owes a compensation")
    key = RunKey(saga_id, run.step, run.trigger_id)
    reason = f"skipped by {operator.name}: {operator.reason}"
    if not count_as_undone(case.runtime(run.participant), session, key, shortened(reason)):
        raise Refused(f"{key} was compensated meanwhile; nothing was skipped")
    case.record(
        run.participant, "skip-compensation", operator, step=step, trigger_id=key.trigger_id
    )
    case.withdraw(run, reason)
    return key


def resolve(
    session: Session,
    saga_id: UUID,
    step: str,
    operator: Operator,
    *,
    happened: bool,
    event: str | None = None,
    participant: str | None = None,
    trigger_id: UUID | None = None,
    schema: str = DEFAULT_SCHEMA,
) -> RunKey:
    """Say whether the call of an unresolved external step took effect; returns the run's key.

    If it did, a worker writes that down, with *event* (the payload as JSON) where the step emits
    one, or undoes it. If not, a worker calls again, or the run ends with its aborted saga. Raises
    `Refused`, with the reason.
    """
    if event is not None:
        _check_json(event)
    case = Case(session, saga_id, schema)
    rows = {row.participant: row for row in case.lock(participant)}
    run = case.the_run(step, participant, trigger_id, _is_unresolved, "is unresolved")
    row = rows[run.participant]
    runtime = case.runtime(run.participant)
    journal = runtime.open_journal(session)
    saga = SagaRow(saga_id, SagaState(row.state), row.stuck, row.reason)
    key = RunKey(saga_id, run.step, run.trigger_id)
    after = StepState.HAPPENED if happened else StepState.NOT_HAPPENED
    reason = f"said by {operator.name}: {operator.reason}"
    journal.advance(key, StepState.UNRESOLVED, after, reason=shortened(reason))
    case.record(
        run.participant, "resolve", operator, step=key.step, trigger_id=key.trigger_id, event=event
    )
    if saga.state.aborted and not happened:
        go_on(runtime, journal, saga, None)
        case.withdraw(run, reason)
    else:
        reset_stuck(journal, saga)
        case.give_back(run)
    return key


def _why_not_aborted(state: SagaState) -> str:
    if state is SagaState.COMPLETED:
        return "it is decided, and a decision is not taken back; undo it with a saga of its own"
    return "it has been aborted before"


def _check_json(event: str) -> None:
    try:
        json.loads(event)
    except ValueError as error:
        raise Refused(f"the event given is no JSON: {error}") from error


def _is_stuck(run: Any) -> bool:
    return StepState(run.state).waits_for_a_person


def _is_unresolved(run: Any) -> bool:
    return StepState(run.state) is StepState.UNRESOLVED
