"""Retiring a participant: nobody waits for it any more.

A participant that is only down is waited for, however long. One that is gone for good would hold up
the unwinding of all whose events it answered, so a person says that it is gone.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox.sql import DEFAULT_SCHEMA
from outbox.statements import statement
from saga.case import runtime_without_code
from saga.journal import SagaState
from saga.unwinding import look_again

_WHO_KNOWS: Final = "SELECT participant FROM {schema}.saga_peer WHERE peer = :peer ORDER BY 1"
_WHO_IS_KNOWN: Final = """
SELECT participant, peer, takes, known_at FROM {schema}.saga_peer ORDER BY participant, peer
"""
_UNWINDING: Final = """
SELECT saga_id FROM {schema}.saga WHERE state = 'compensating' AND participant = :participant
"""


def known_peers(
    session: Session, *, schema: str = DEFAULT_SCHEMA
) -> list[tuple[str, str, tuple[str, ...]]]:
    """Who knows whom in one schema: participant, peer, the event types that the peer answers."""
    rows = session.execute(statement(_WHO_IS_KNOWN, schema))
    return [(row.participant, row.peer, tuple(row.takes)) for row in rows]


def forget_peer(engine: Engine, peer: str, *, schema: str = DEFAULT_SCHEMA) -> dict[str, int]:
    """Let the participants of one schema wait for *peer* no longer: who knew it, and how many sagas
    each of them is unwinding, which were looked at again.

    One transaction for each saga. Where *peer* comes back after all, it introduces itself anew.
    """
    with Session(engine) as session, session.begin():
        rows = session.execute(statement(_WHO_KNOWS, schema), {"peer": peer})
        knowing = [row.participant for row in rows if row.participant != peer]
    return {participant: _forget(engine, participant, peer, schema) for participant in knowing}


def _forget(engine: Engine, participant: str, peer: str, schema: str) -> int:
    runtime = runtime_without_code(participant, schema)
    with Session(engine) as session, session.begin():
        runtime.open_journal(session).forget(peer)
        rows = session.execute(statement(_UNWINDING, schema), {"participant": participant})
        unwinding: list[UUID] = [row.saga_id for row in rows]
    for saga_id in unwinding:
        with Session(engine) as session, session.begin():
            journal = runtime.open_journal(session)
            saga = journal.lock(saga_id)
            if saga.state is SagaState.COMPENSATING:
                journal.hear(saga_id, peer, ())
                look_again(runtime, journal, saga, None)
    return len(unwinding)
