"""Unwinding: what an abort makes of one participant's part in a saga, until nothing of it is left.

An abort seals the saga here: no step of it will run any more. Every step that was done becomes
durable work: a delivery of its own to the step's compensation (Garcia-Molina & Salem 1987), with
its own transaction, attempts and dead letter, so one that fails or hangs stops no other branch.

*When a run is undone.* In reverse causal order, without a coordinator: once every step that answers
one of its events is undone or never ran. Each participant says with `saga.undone` what it still has
to undo and which events that had answered: when it seals the saga, and whenever something more is
undone. So a run is free when no run here and no word from elsewhere names one of its events, and
all who are known to answer them (see `saga.peers`) have sealed the saga. A participant that is down
is waited for; one that nobody has ever heard of is not. With ``unwind="eager"`` every run is free
at once. Waits cannot go round in a circle: an event is caused only by earlier ones.

Why a word can be trusted, whenever it comes: only who has sealed the saga speaks, and from then on
what it owes only shrinks. An event that is missing from any one of its words is never answered
there again. So words are intersected, and duplicates and disorder change nothing.

Why nothing is left, and nothing is undone twice: the abort holds the saga's lock, sees every step
that was ever done here (see `saga.step`), and no further one will run. A run moves from *done* to
*compensating* under that lock, in the commit that also owes the delivery. The compensation locks
the run's row, so a second delivery waits, then finds it *compensated*. Only at its end does it lock
the saga, to free what has waited for it and to see whether it was the last: the one that comes
second sees the first one's commit, hence exactly one finds nothing left. Who holds the saga's lock
without a run's touches only runs that are *done* or *stuck*, and no compensation holds those, so
the two kinds of lock cannot deadlock.

Why none waits for ever: the last of three events frees a run: its own participant sealed the saga,
a run here that answers it was undone, or a word came. Each of them looks at all runs anew, under
the saga's lock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.envelope import Envelope
from outbox.service import Delivery
from saga.control import CompensationDue, OwedCompensation, SagaStuck, SagaUndone
from saga.errors import NoCompensation, SagaError
from saga.journal import ClaimedRun, Journal, RunKey, SagaRow, SagaState, StepRow, StepState
from saga.reaction import Reaction
from saga.runtime import Runtime, described


def unwind(
    runtime: Runtime, journal: Journal, saga: SagaRow, *, reason: str, cause: Envelope
) -> None:
    """Seal a running saga here: call off what is stuck, and undo what was done once it is free."""
    runs = [] if saga.new else journal.runs(saga.saga_id)
    for run in [run for run in runs if run.state is StepState.STUCK]:
        journal.advance(run.key, run.state, StepState.SKIPPED, reason="aborted while stuck")
        runs.remove(run)
    _undo(runtime, journal, replace(saga, reason=reason), runs, cause)


def hear_undone(
    runtime: Runtime, journal: Journal, saga: SagaRow, undone: SagaUndone, cause: Envelope
) -> None:
    """Take in what a peer still has to undo, and undo what was waiting for that."""
    if saga.state is SagaState.COMPLETED or saga.state is SagaState.COMPENSATED:
        return
    if not (saga.new or runtime.unwinds_eagerly):
        pending = {event_id for one in undone.pending for event_id in one.causes}
        journal.hear(saga.saga_id, undone.participant, pending)
    if saga.state is SagaState.RUNNING:
        # Who unwinds has heard of the abort: its word is as good as the abort itself.
        unwind(runtime, journal, saga, reason=undone.reason, cause=cause)
        return
    look_again(runtime, journal, saga, cause)


def look_again(runtime: Runtime, journal: Journal, saga: SagaRow, cause: Envelope | None) -> None:
    """Something may have come free in a locked saga that is compensating."""
    _undo(runtime, journal, saga, journal.runs(saga.saga_id), cause, only_if_less=True)


def go_on(runtime: Runtime, journal: Journal, saga: SagaRow, cause: Envelope | None) -> None:
    """One more run of a locked, aborted saga is undone: free what waited for it, and say so."""
    _undo(runtime, journal, saga, journal.runs(saga.saga_id), cause)


def _undo(
    runtime: Runtime,
    journal: Journal,
    saga: SagaRow,
    runs: list[StepRow],
    cause: Envelope | None,
    *,
    only_if_less: bool = False,
) -> None:
    """Owe the compensation of each run that is free; write and publish how the unwinding stands."""
    owed = [run for run in runs if run.state.has_effects]
    left = _undo_what_is_free(runtime, journal, saga, owed, cause)
    if only_if_less and len(left) == len(owed):
        return
    # An ended saga stays ended, also while a late result is undone (`saga.external`).
    is_open = bool(left) and saga.state is not SagaState.COMPENSATED
    state = SagaState.COMPENSATING if is_open else SagaState.COMPENSATED
    stuck = any(run.state.waits_for_a_person for run in runs)
    if (state, stuck) != (saga.state, saga.stuck):
        journal.move(saga, state, stuck=stuck, reason=saga.reason)
    pending = tuple(
        OwedCompensation(run.key.step, run.key.trigger_id, tuple(sorted(run.causes)))
        for run in left
    )
    undone = SagaUndone(saga.saga_id, runtime.participant, pending, saga.reason or "")
    runtime.publish(journal, undone, saga.saga_id, cause)


def _undo_what_is_free(
    runtime: Runtime,
    journal: Journal,
    saga: SagaRow,
    owed: list[StepRow],
    cause: Envelope | None,
) -> list[StepRow]:
    left = list(owed)
    waiting = [run for run in owed if run.state is StepState.DONE]
    answered = None
    if waiting and not runtime.unwinds_eagerly:
        answered = _Answered(journal, saga.saga_id, runtime.participant)
    # Latest first: a run with nothing to undo frees what caused it, which was there before it.
    for run in reversed(waiting):
        if answered is not None and answered.by(run, left):
            continue
        reaction = runtime.reactions.get(run.key.step)
        if reaction is not None and reaction.nothing_to_undo is not None:
            reason = reaction.nothing_to_undo
            journal.advance(run.key, run.state, StepState.COMPENSATED, reason=reason)
            left.remove(run)
        else:
            journal.advance(run.key, run.state, StepState.COMPENSATING)
            owe_compensation(runtime, journal, run.key, cause)
    return left


def awaited(journal: Journal, saga_id: UUID, participant: str) -> list[tuple[RunKey, set[str]]]:
    """The runs that are not free yet, each with the participants that it waits for."""
    runs = [run for run in journal.runs(saga_id) if run.state.has_effects]
    answered = _Answered(journal, saga_id, participant)
    waiting = [run for run in runs if run.state is StepState.DONE]
    return [(run.key, answered.by(run, runs)) for run in waiting]


class _Answered:
    """Whose answers to a run's events are not known to be undone."""

    def __init__(self, journal: Journal, saga_id: UUID, participant: str) -> None:
        self._participant = participant
        self._peers = journal.peers_of(saga_id)

    def by(self, run: StepRow, here: list[StepRow]) -> set[str]:
        """Who they are, among them this participant for what was done *here*."""
        ids = {event.event_id for event in run.published}
        types = {event.type for event in run.published}
        peers = {peer for peer, pending in self._peers.heard.items() if pending & ids}
        peers |= {peer for peer, takes in self._peers.silent.items() if takes & types}
        if any(other.causes & ids for other in here if other is not run):
            peers.add(self._participant)
        return peers


def owe_compensation(
    runtime: Runtime, journal: Journal, key: RunKey, cause: Envelope | None
) -> None:
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
    _call_undo(runtime, journal, reaction, run)
    saga = journal.lock(key.saga_id)
    journal.advance(key, run.state, StepState.COMPENSATED)
    go_on(runtime, journal, saga, delivery.envelope)


def count_as_undone(runtime: Runtime, session: Session, key: RunKey, reason: str) -> bool:
    """End a run that owes its compensation without calling it; False where it owes none any more."""
    journal = runtime.open_journal(session)
    run = journal.claim(key)
    if run is None or not run.state.owes_compensation:
        return False
    saga = journal.lock(key.saga_id)
    journal.advance(key, run.state, StepState.COMPENSATED, reason=reason)
    go_on(runtime, journal, saga, None)
    return True


def _call_undo(
    runtime: Runtime, journal: Journal, reaction: Reaction[..., Any], run: ClaimedRun
) -> None:
    if reaction.undo is None:
        # What says nothing_to_undo only now, after a change of its declaration, is undone as well.
        if reaction.nothing_to_undo is None:
            raise NoCompensation(
                f"{reaction} ({reaction.place}) was done and must be undone, and has no "
                'compensation: write one, or say nothing_to_undo="why"; deploy, then redrive'
            )
        return
    arguments = [*_triggers(runtime, journal, reaction, run)]
    if run.emitted is not None:
        arguments.append(runtime.read(run.emitted))
    with runtime.working(run.key, compensating=True):
        reaction.undo(*arguments, journal.session)
        journal.flush()


def _triggers(
    runtime: Runtime, journal: Journal, reaction: Reaction[..., Any], run: ClaimedRun
) -> list[object]:
    if len(reaction.on) == 1:
        return [runtime.read(run.trigger)]
    arrived = journal.arrivals(run.key.saga_id, run.key.step)
    return [*runtime.arguments(reaction, arrived)]


def refuse_removed(runtime: Runtime, step: str, *_: object) -> None:
    """What a compensation does whose step is in this deployment no more."""
    raise NoCompensation(
        f"{runtime.participant}.{step} was done and must be undone, and this deployment has no such "
        f'step: deploy it again, or what has become of it with was="{step}", then `saga resume`; or '
        "undo it by hand, then `saga skip-compensation`"
    )


def park_compensation(
    runtime: Runtime,
    _reaction: Reaction[..., Any] | None,
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
    stuck = SagaStuck(key.saga_id, runtime.participant, key.step, type(error).__name__)
    runtime.publish(journal, stuck, key.saga_id, delivery.envelope)


def _due(runtime: Runtime, delivery: Delivery) -> RunKey:
    # Not `delivery.event`, which a delivery that is parked unread does not have.
    due: CompensationDue = runtime.read(delivery.envelope.body)
    return RunKey(due.saga_id, due.step, due.trigger_id)
