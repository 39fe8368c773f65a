"""Who answers which events: what reverse unwinding has to wait for.

Nobody is configured to know anybody. Each participant introduces itself with `saga.introduced`: the
event types that its steps and joins answer. Who hears that of someone new introduces itself in
turn. So any two participants that ever ran at the same time know each other, whichever came first:
the later one's introduction reaches the earlier one's queue, which exists by then, and the answer
reaches the later one's, which existed before it spoke. That it did is why a participant introduces
itself in a delivery to its own queue, and not where its worker starts.

An introduction is repeated only when it says something new, so the talking ends. One that is not
heard yet costs order, never consistency: a saga that is aborted meanwhile is undone all the same.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox.service import Delivery
from saga.control import INTRODUCTION_DUE, IntroductionDue, ParticipantIntroduced
from saga.journal import Journal
from saga.runtime import Runtime

HANDLER: Final = INTRODUCTION_DUE.name


def see_to_introduction(runtime: Runtime, engine: Engine) -> None:
    """Owe the others an introduction where there has been none, or not of what is declared now."""
    with Session(engine) as session, session.begin():
        journal = runtime.open_journal(session)
        known = journal.peers().get(runtime.participant)
        if known != runtime.answers:
            due = runtime.free_envelope(IntroductionDue(runtime.participant), None)
            journal.schedule(runtime.handler(HANDLER), due)


def introduce(runtime: Runtime, delivery: Delivery, session: Session) -> None:
    """Say who answers what here: a delivery that the participant owes itself."""
    _introduce(runtime, runtime.open_journal(session), delivery)


def on_introduced(runtime: Runtime, delivery: Delivery, session: Session) -> None:
    """Get to know a peer, and answer one that is new."""
    introduced: ParticipantIntroduced = delivery.event
    if introduced.participant == runtime.participant:
        return
    journal = runtime.open_journal(session)
    if journal.know(introduced.participant, introduced.takes, delivery.envelope.id):
        _introduce(runtime, journal, delivery)


def _introduce(runtime: Runtime, journal: Journal, delivery: Delivery) -> None:
    said = ParticipantIntroduced(runtime.participant, tuple(sorted(runtime.answers)))
    envelope = runtime.free_envelope(said, delivery.envelope)
    journal.append(envelope, runtime.registry.of(said))
    journal.know(runtime.participant, said.takes, envelope.id)
