"""One saga as an operator finds it in one schema: its rows locked, its runs, and what is owed or parked for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from outbox import dead_letters, inbox, pending, quarantine
from outbox.dead_letters import Matching
from outbox.envelope import decode
from outbox.events import Registry
from outbox.statements import statement
from saga import batching
from saga.control import CONTROL_EVENTS, CompensationDue, register_control_events
from saga.errors import Refused
from saga.journal import StepState
from saga.runtime import Runtime, shortened
from saga.store import SqlJournal

_CONTROL: Final = {event_type.name for event_type in CONTROL_EVENTS}
_LOCK: Final = """
SELECT participant, definition, decides, state, stuck, reason FROM {schema}.saga
WHERE saga_id = :saga_id AND (CAST(:participant AS text) IS NULL OR participant = :participant)
ORDER BY participant FOR UPDATE
"""
_RUNS: Final = """
SELECT participant, step, trigger_id, state, trigger FROM {schema}.saga_step
WHERE saga_id = :saga_id AND (CAST(:participant AS text) IS NULL OR participant = :participant)
ORDER BY ordinal
"""
_RECORD: Final = """
INSERT INTO {schema}.saga_intervention
    (saga_id, participant, verb, step, trigger_id, operator, reason, event)
VALUES (:saga_id, :participant, :verb, :step, :trigger_id, :operator, :reason, :event)
"""
# An event of a saga has the saga's id in it; what is owed to a compensation, its run's trigger too.
_ABOUT: Final = """
handler = :handler AND position(CAST(:saga AS bytea) IN body) > 0
    AND (CAST(:trigger AS bytea) IS NULL OR position(CAST(:trigger AS bytea) IN body) > 0)
"""
_LETTERS: Final = f"SELECT id FROM {{schema}}.dead_letter WHERE {_ABOUT} ORDER BY id"  # noqa: S608
_OWED: Final = f"SELECT event_id FROM {{schema}}.pending_delivery WHERE {_ABOUT}"  # noqa: S608
_QUARANTINED: Final = """
SELECT id FROM {schema}.quarantine WHERE service = :participant
    AND position(CAST(:saga AS bytea) IN body) > 0
    AND position(CAST(:trigger AS bytea) IN body) > 0 ORDER BY id
"""


@dataclass(frozen=True)
class Operator:
    """Who acts, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Resumed:
    """One stuck run, and what was done about it."""

    participant: str
    step: str
    state: str
    by: str
    """"dead letter 5", "quarantined message 7", "the journal", "under way already", or why not."""
    goes_on: bool = True


class Case:
    """One saga, as the participants in one schema have it."""

    def __init__(self, session: Session, saga_id: UUID, schema: str) -> None:
        batching.forget(session)
        self.session = session
        self.saga_id = saga_id
        self.schema = schema

    def lock(self, participant: str | None) -> Sequence[Any]:
        rows = self._rows(_LOCK, participant=participant)
        if not rows:
            whose = f" of participant {participant}" if participant else ""
            raise Refused(
                f"schema {self.schema!r}{whose} has never heard of saga {self.saga_id}, or has "
                "forgotten it: ask the database of a participant that shows it (saga show)"
            )
        return rows

    def runs(self, participant: str | None) -> Sequence[Any]:
        return self._rows(_RUNS, participant=participant)

    def the_run(
        self,
        step: str,
        participant: str | None,
        trigger_id: UUID | None,
        is_meant: Callable[[Any], bool],
        what: str,
    ) -> Any:
        """The one run of *step* that *is_meant*. Raises `Refused`, saying what there is."""
        runs = self.runs(participant)
        named = [
            run
            for run in runs
            if step in (run.step, f"{run.participant}.{run.step}")
            and trigger_id in (None, run.trigger_id)
        ]
        meant = [run for run in named if is_meant(run)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            which = ", ".join(f"{run.participant}.{run.step} {run.trigger_id}" for run in meant)
            raise Refused(
                f"each of {len(meant)} runs of {step} {what}; say which, with --trigger and "
                f"--participant: {which}"
            )
        if named:
            states = ", ".join(f"{run.participant}.{run.step} is {run.state}" for run in named)
            raise Refused(f"no run of {step} in saga {self.saga_id} {what}: {states}")
        known = ", ".join(dict.fromkeys(f"{run.participant}.{run.step}" for run in runs)) or "none"
        raise Refused(f"saga {self.saga_id} has no run of {step} here; its runs here: {known}")

    def runtime(self, participant: str) -> Runtime:
        return runtime_without_code(participant, self.schema)

    def record(
        self,
        participant: str,
        verb: str,
        operator: Operator,
        *,
        step: str | None = None,
        trigger_id: UUID | None = None,
        event: str | None = None,
    ) -> None:
        self.session.execute(
            statement(_RECORD, self.schema),
            {
                "saga_id": self.saga_id,
                "participant": participant,
                "verb": verb,
                "step": step,
                "trigger_id": trigger_id,
                "operator": shortened(operator.name),
                "reason": shortened(operator.reason),
                "event": event,
            },
        )

    def give_back(self, run: Any) -> Resumed:
        about = self._about(run)
        ids = [row.id for row in self._rows(_LETTERS, **about)]
        redriven = [
            id
            for id in ids
            if dead_letters.redrive(self.session, Matching(id=id), schema=self.schema)
        ]
        if redriven:
            return _resumed(run, f"dead letter {', '.join(map(str, redriven))}")
        if self._rows(_OWED, **about):
            return _resumed(run, "under way already")
        if not owes(run):
            return self._give_back_a_step(run)
        due = CompensationDue(self.saga_id, run.step, run.trigger_id)
        envelope = self.runtime(run.participant).envelope(due, self.saga_id, None)
        pending.schedule(
            self.session, run.participant, about["handler"], envelope, schema=self.schema
        )
        return _resumed(run, "the journal")

    def _give_back_a_step(self, run: Any) -> Resumed:
        body = bytes(run.trigger)
        envelope = decode(body)
        unread = self._rows(
            _QUARANTINED,
            participant=run.participant,
            saga=str(self.saga_id).encode(),
            trigger=str(envelope.id).encode(),
        )
        for row in unread:
            if quarantine.redrive(self.session, row.id, schema=self.schema):
                return _resumed(run, f"quarantined message {row.id}")
        handler = f"{run.participant}.{run.step}"
        if envelope.type in _CONTROL and inbox.earlier_delivery(
            self.session, envelope.id, handler, envelope.digest, schema=self.schema
        ):
            return _resumed(
                run, "no: its event was handled, the saga itself is amiss", goes_on=False
            )
        # Somebody may have discarded it, which leaves it in the inbox so that no copy of it is run. The
        # journal knows better: it lets a stuck run be made, and made once.
        inbox.take_back(self.session, envelope.id, handler, schema=self.schema)
        owed = pending.Owed(
            run.participant, handler, envelope.id, envelope.type, body, envelope.key
        )
        pending.owe(self.session, owed, "redrive", schema=self.schema)
        return _resumed(run, "the journal")

    def withdraw(self, run: Any, reason: str) -> None:
        about = self._about(run)
        for row in self._rows(_LETTERS, **about):
            dead_letters.discard(self.session, Matching(id=row.id), reason, schema=self.schema)
        for row in self._rows(_OWED, **about):
            pending.withdraw(self.session, about["handler"], row.event_id, schema=self.schema)

    def _about(self, run: Any) -> dict[str, Any]:
        """What finds the deliveries of a run: those of its compensation, once it owes one."""
        handler = f"{run.participant}.{run.step}"
        saga = str(self.saga_id).encode()
        if not owes(run):
            trigger = None if run.trigger_id == self.saga_id else str(run.trigger_id).encode()
            return {"handler": handler, "saga": saga, "trigger": trigger}
        trigger = str(run.trigger_id).encode()
        return {"handler": f"{handler}.compensation", "saga": saga, "trigger": trigger}

    def _rows(self, template: str, **values: object) -> Sequence[Any]:
        values = {"saga_id": self.saga_id, **values}
        return self.session.execute(statement(template, self.schema), values).all()


def runtime_without_code(participant: str, schema: str) -> Runtime:
    """A participant's runtime that knows no declaration: control events are all that it can read."""
    registry = Registry()
    register_control_events(registry)
    return Runtime(
        participant, registry, {}, lambda session: SqlJournal(session, participant, schema)
    )


def owes(run: Any) -> bool:
    return StepState(run.state).owes_compensation


def _resumed(run: Any, by: str, *, goes_on: bool = True) -> Resumed:
    return Resumed(run.participant, run.step, run.state, by, goes_on)
