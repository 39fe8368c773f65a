"""Where sagas stand, as the journals in one database schema have it: for people, read only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement
from saga.journal import SagaState
from saga.store import SqlJournal
from saga.unwinding import awaited

_SAGA: Final = (
    "saga_id, participant, definition, decides, state, stuck, reason, started_at, changed_at"
)
# The first condition is what the partial index `saga_open` holds, word for word.
_OPEN: Final = f"""
SELECT {_SAGA} FROM {{schema}}.saga WHERE state IN ('running', 'compensating')
    AND (CAST(:participant AS text) IS NULL OR participant = :participant)
ORDER BY saga_id DESC LIMIT :limit
"""  # noqa: S608 - a constant list of columns
# Newest first, as far as the ids are UUIDv7, which they are unless the caller of `start` gave one.
_ALL: Final = f"""
SELECT {_SAGA} FROM {{schema}}.saga
WHERE (CAST(:participant AS text) IS NULL OR participant = :participant)
    AND (CAST(:state AS text) IS NULL OR state = :state)
ORDER BY saga_id DESC LIMIT :limit
"""  # noqa: S608
_STUCK: Final = f"""
SELECT {_SAGA} FROM {{schema}}.saga WHERE stuck
    AND (CAST(:participant AS text) IS NULL OR participant = :participant)
ORDER BY changed_at LIMIT :limit
"""  # noqa: S608
_ONE: Final = f"SELECT {_SAGA} FROM {{schema}}.saga WHERE saga_id = :saga_id ORDER BY started_at"  # noqa: S608
_STEPS: Final = """
SELECT participant, step, trigger_id, state, reason, ran_at, changed_at, trigger, emitted
FROM {schema}.saga_step WHERE saga_id = :saga_id ORDER BY ordinal
"""
_ARRIVALS: Final = """
SELECT participant, "join", type, event_id, arrived_at
FROM {schema}.saga_join_arrival WHERE saga_id = :saga_id ORDER BY arrived_at
"""
_INTERVENTIONS: Final = """
SELECT participant, verb, step, trigger_id, operator, reason, at
FROM {schema}.saga_intervention WHERE saga_id = :saga_id ORDER BY id
"""
# There are few dead letters, and each event of a saga has the saga's id in it.
_LETTERS: Final = """
SELECT id, handler FROM {schema}.dead_letter
WHERE position(CAST(:needle AS bytea) IN body) > 0 ORDER BY id
"""


@dataclass(frozen=True)
class SagaStanding:
    """One saga as one participant has it."""

    saga_id: UUID
    participant: str
    definition: str | None
    """The event type that started it, where it was started here."""
    decides: bool
    """Whether it is decided here, and so can be aborted here."""
    state: str
    stuck: bool
    reason: str | None
    """Why it was aborted."""
    started_at: datetime
    """When this participant first heard of it."""
    changed_at: datetime


@dataclass(frozen=True)
class StepStanding:
    """One run of a step."""

    participant: str
    step: str
    trigger_id: UUID
    state: str
    reason: str | None
    ran_at: datetime
    changed_at: datetime
    trigger: bytes
    """The triggering event's exact envelope."""
    emitted: bytes | None

    @property
    def is_stuck(self) -> bool:
        return self.state in ("stuck", "unresolved", "compensation_stuck")


@dataclass(frozen=True)
class Arrival:
    """An event that a join has."""

    participant: str
    join: str
    type: str
    event_id: UUID
    arrived_at: datetime


@dataclass(frozen=True)
class Intervention:
    """What a person did to it."""

    participant: str
    verb: str
    step: str | None
    trigger_id: UUID | None
    operator: str
    reason: str
    at: datetime


@dataclass(frozen=True)
class Wait:
    """A step that is undone once others have undone what they did in answer to its events."""

    participant: str
    step: str
    trigger_id: UUID
    waits_for: tuple[str, ...]
    """Participants."""


@dataclass(frozen=True)
class Story:
    """All that is known of one saga here."""

    sagas: tuple[SagaStanding, ...]
    steps: tuple[StepStanding, ...]
    arrivals: tuple[Arrival, ...]
    dead_letters: tuple[tuple[int, str], ...]
    """Id and handler of what waits for a redrive."""
    interventions: tuple[Intervention, ...]
    waits: tuple[Wait, ...]
    """Of a saga being undone: steps whose turn has not come."""


def open_sagas(
    session: Session,
    *,
    participant: str | None = None,
    limit: int = 100,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[SagaStanding]:
    """Sagas that have not ended, newest first."""
    return _sagas(session, _OPEN, schema, participant=participant, limit=limit)


def all_sagas(
    session: Session,
    *,
    participant: str | None = None,
    state: str | None = None,
    limit: int = 100,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[SagaStanding]:
    """Sagas in *state*, or in any, newest first."""
    return _sagas(session, _ALL, schema, participant=participant, state=state, limit=limit)


def stuck_sagas(
    session: Session,
    *,
    participant: str | None = None,
    limit: int = 100,
    schema: str = DEFAULT_SCHEMA,
) -> Sequence[SagaStanding]:
    """Sagas that wait for a person, longest first."""
    return _sagas(session, _STUCK, schema, participant=participant, limit=limit)


def story(session: Session, saga_id: UUID, *, schema: str = DEFAULT_SCHEMA) -> Story | None:
    """All that is known of one saga; None where nobody here has heard of it."""
    sagas = _sagas(session, _ONE, schema, saga_id=saga_id)
    if not sagas:
        return None
    needle = str(saga_id).encode()
    return Story(
        sagas=tuple(sagas),
        steps=tuple(
            StepStanding(**row._mapping) for row in _rows(session, _STEPS, schema, saga_id=saga_id)
        ),
        arrivals=tuple(
            Arrival(**row._mapping) for row in _rows(session, _ARRIVALS, schema, saga_id=saga_id)
        ),
        dead_letters=tuple(
            (row.id, row.handler) for row in _rows(session, _LETTERS, schema, needle=needle)
        ),
        interventions=tuple(
            Intervention(**row._mapping)
            for row in _rows(session, _INTERVENTIONS, schema, saga_id=saga_id)
        ),
        waits=tuple(wait for saga in sagas for wait in _waits(session, saga, schema)),
    )


def _waits(session: Session, saga: SagaStanding, schema: str) -> list[Wait]:
    if saga.state != SagaState.COMPENSATING:
        return []
    journal = SqlJournal(session, saga.participant, schema)
    return [
        Wait(saga.participant, key.step, key.trigger_id, tuple(sorted(peers)))
        for key, peers in awaited(journal, saga.saga_id, saga.participant)
        if peers
    ]


def _sagas(
    session: Session, template: str, schema: str, **values: object
) -> Sequence[SagaStanding]:
    rows = _rows(session, template, schema, **values)
    return [SagaStanding(**row._mapping) for row in rows]


def _rows(session: Session, template: str, schema: str, **values: object) -> Sequence[Any]:
    return session.execute(statement(template, schema), values).all()
