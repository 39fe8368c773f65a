"""External steps: what acts outside of the database (a card is charged), where no transaction reaches.

One attempt is two transactions with the call between them: the *intent* (the run's row says
`calling`), the call, the *result* (the row says what came of it, with the event and the inbox row).
`outbox` notes the attempt before the intent, so whatever dies where, the delivery comes back.

The invariant: from the commit of the intent until the commit of a result, the run is *uncertain*,
and nobody takes it for empty. What that means for each that may come in between:

- A *redelivery* that finds an intent without a result asks the step's `resolve` hook, not the
  function. If the call took effect, its result is written down as if it had been heard; if not, and
  the saga still runs, the function is called again, with the same idempotency key.
- An *abort* counts the run among what is still to be undone, and leaves it. Abort and result lock
  the saga's row. If the abort is first, the result finds the saga aborted: a call that took effect
  becomes a run that owes its compensation (its event is kept for that, and not published), one that
  did not ends the run, and the saga if it was the last. If the result is first, the abort finds an
  ordinary run. If there never is a result, because the worker died, the delivery that comes back
  resolves it, aborted or not. So an aborted saga ends only once each intent is known to be empty or
  is undone.
- `Unknown`, or no hook at all, is a failed attempt. After the last one the run is `unresolved` and
  the saga stuck, until it is resumed or a person says what happened (`saga resolve`).
- A *late result* (a worker was paused before its call, another has meanwhile found that nothing
  happened and ended the run) is still written down: the run owes its compensation after all. That
  window is why a hook that returns None says that the call never *will* take effect. It is small:
  nobody resolves before the attempt's lease has passed (`TransactionLimits.lease`, 60 s), so give
  the call a timeout well below that.

What is called twice is called with one key, as the runs' keys do not change; that the other side
heeds it is what an external step asks of it. A compensation needs no intent: it is called, in its
transaction, until it has succeeded once, each time with its own key.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from outbox.crash_points import crash_point
from outbox.service import Delivery
from outbox.work import Busy
from saga.context import Emission
from saga.declaration import ExternalStep
from saga.errors import Unknown
from saga.journal import Journal, RunKey, StepState
from saga.reaction import Reject
from saga.runtime import (
    Runtime,
    log,
    reset_stuck,
    saga_id_of,
    shortened,
)
from saga.step import Run, finish, reject, skip
from saga.unwinding import go_on, owe_compensation

_CALLS_AGAIN = (None, StepState.STUCK, StepState.NOT_HAPPENED)


@dataclass(frozen=True)
class Answer:
    """What came of a call: a rejection, an event (None for a step that emits none), or nothing."""

    event: object = None
    rejection: Reject | None = None
    took_effect: bool = True


@dataclass(frozen=True)
class Call:
    """One call of an external step, to be made outside of any transaction."""

    runtime: Runtime
    step: ExternalStep[..., Any]
    key: RunKey
    event: object

    def make(self) -> Answer:
        """Call the step's function."""
        crash_point("external.calling")
        return self._asked(lambda: self.step(self.event))

    def resolve(self, *, aborted: bool) -> Answer:
        """Find out what came of an earlier call; where nothing did, make it, unless *aborted*."""
        hook = self.step.resolver
        if hook is None:
            raise Unknown(
                f"{self.step} was called and nothing is known of the result; it has no resolve "
                f"hook that could find out ({self.step.place}): find out, then `saga resolve`"
            )
        answer = self._asked(lambda: self._found(hook(self.event)))
        if answer.took_effect or answer.rejection is not None or aborted:
            return answer
        return self.make()

    def as_told(self, verdict: str | None) -> Answer:
        """The answer of a call of which a person has said that it took effect."""
        emits = self.step.emits
        if not emits:
            return Answer()
        if len(emits) > 1 or verdict is None:
            raise Unknown(
                f"{self.step} is said to have happened, and not with which event: give it as JSON "
                f"(saga resolve --happened --event) for a step that emits one type; it emits "
                f"{', '.join(map(str, emits))}"
            )
        (emitted,) = emits
        registry = self.runtime.registry
        return Answer(registry.read(emitted.name, emitted.version, json.loads(verdict)))

    def _asked(self, ask: Callable[[], Any]) -> Answer:
        try:
            with self.runtime.working(self.key):
                found = ask()
        except Reject as rejection:
            self.step.check_rejection(rejection.event)
            return Answer(rejection=rejection, took_effect=False)
        if isinstance(found, Answer):
            return found
        self.step.check_answer(found)
        return Answer(found)

    def _found(self, answer: object) -> object:
        if answer is None or (answer is False and not self.step.emits):
            return Answer(took_effect=False)
        return None if answer is True and not self.step.emits else answer


def prepare_call(
    runtime: Runtime, step: ExternalStep[..., Any], delivery: Delivery, session: Session
) -> Callable[[], Answer] | None:
    """Commit the intent, or find an earlier one; returns what to call after that, if anything."""
    journal = runtime.open_journal(session)
    key = RunKey(saga_id_of(delivery), step.name_in(delivery.handler), delivery.envelope.id)
    saga = journal.lock(key.saga_id)
    before = None if saga.new else journal.find(key)
    key = journal.known_as(key)
    call = Call(runtime, step, key, delivery.event)
    if before in _CALLS_AGAIN and not saga.state.aborted:
        trigger = delivery.envelope.body
        journal.record(key, before, StepState.CALLING, trigger=trigger)
        if saga.stuck and before is StepState.STUCK:
            reset_stuck(journal, saga)
        return call.make
    if before is StepState.HAPPENED:
        verdict = journal.verdict(key)
        return lambda: call.as_told(verdict)
    if before is not None and before.is_uncertain:
        aborted = saga.state.aborted
        return lambda: call.resolve(aborted=aborted)
    return None


def finish_call(
    runtime: Runtime, step: ExternalStep[..., Any], delivery: Delivery, session: Session
) -> None:
    """Write down what came of the call."""
    journal = runtime.open_journal(session)
    trigger = delivery.envelope
    key = RunKey(saga_id_of(delivery), step.name_in(delivery.handler), trigger.id)
    saga = journal.lock(key.saga_id)
    before = None if saga.new else journal.find(key)
    key = journal.known_as(key)
    answer: Answer | None = delivery.result
    if answer is None:
        if before is None:
            skip(journal, key, trigger, saga)
        return
    if before is None or not (before.is_uncertain or before is StepState.NOT_HAPPENED):
        return
    published = _record(step, delivery, key, answer, runtime, session)
    run = Run(saga, key, before, trigger, (delivery.event,))
    if before is StepState.HAPPENED and not answer.took_effect:
        raise Busy(f"{key}: a person has said meanwhile that it happened")
    if saga.state.aborted:
        end_in_an_aborted_saga(runtime, journal, run, answer)
    elif answer.rejection is not None:
        reject(runtime, journal, step, run, answer.rejection)
    elif answer.took_effect:
        finish(runtime, journal, step, run, answer.event, published)
    elif before.is_uncertain:
        raise Unknown(f"{key} did not happen, and its saga runs: it is called again")


def _record(
    step: ExternalStep[..., Any],
    delivery: Delivery,
    key: RunKey,
    answer: Answer,
    runtime: Runtime,
    session: Session,
) -> list[Emission]:
    if step.recorder is None or not answer.took_effect:
        return []
    emitted = [] if answer.event is None else [answer.event]
    with runtime.working(key) as working:
        step.recorder(delivery.event, *emitted, session)
        session.flush()
    return working.published


def end_in_an_aborted_saga(runtime: Runtime, journal: Journal, run: Run, answer: Answer) -> None:
    """A result came of a run whose saga was aborted meanwhile: undo it, or note that there is none."""
    key, body = run.key, run.trigger.body
    assert run.before is not None
    if answer.took_effect:
        if run.before is StepState.NOT_HAPPENED:
            log.error("%s took effect after it was found that it had not: it is undone", key)
        emitted = (
            None
            if answer.event is None
            else runtime.envelope(answer.event, key.saga_id, run.trigger).body
        )
        journal.record(key, run.before, StepState.COMPENSATING, trigger=body, emitted=emitted)
        reset_stuck(journal, run.saga)
        owe_compensation(runtime, journal, key, run.trigger)
    elif run.before.is_uncertain:
        rejection = answer.rejection
        after = StepState.NOT_HAPPENED if rejection is None else StepState.REJECTED
        reason = f"the saga was {run.saga.state} when its result came"
        if rejection is not None:
            reason = shortened(rejection.reason or type(rejection.event).__name__)
        journal.record(key, run.before, after, trigger=body, reason=reason)
        go_on(runtime, journal, run.saga, run.trigger)
