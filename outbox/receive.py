"""Receiving: from a message's bytes to a commit, after which the message can be acked.

`Receiver.receive` knows no broker and no Celery. When it returns, everything about the message is
settled in the database: handled, owed again, parked or quarantined. When it raises, the message
must go back to its queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from random import Random
from typing import Any
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import attempt, pending, quarantine
from outbox.attempt import Busy, Outcome, TransactionLimits, Work
from outbox.crash_points import crash_point
from outbox.envelope import Envelope, decode
from outbox.errors import MalformedMessage, UnknownEventType
from outbox.events import Registry
from outbox.ids import created_at
from outbox.limits import DEFAULT_LIMITS, Limits
from outbox.service import Handler, Service
from outbox.transactions import NotSettled, Transactions

log = logging.getLogger(__name__)

__all__ = ["NotSettled", "Outcome", "Receipt", "ReceiveSettings", "Receiver"]


@dataclass(frozen=True)
class ReceiveSettings:
    """How a worker receives."""

    dedupe_window: timedelta = timedelta(days=30)
    """How long the inbox remembers. An older event is quarantined, not run again."""
    patience: timedelta = timedelta(seconds=30)
    """How long a message waits in the worker for a database that is away, before it goes back."""
    tries: int = 5
    """Runs of one attempt that ends in a deadlock or a lost connection."""
    limits: Limits = DEFAULT_LIMITS
    transaction: TransactionLimits = field(default_factory=TransactionLimits)


@dataclass(frozen=True)
class Receipt:
    """What became of one message."""

    event_id: UUID | None = None
    type: str | None = None
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """By handler."""
    refused: str | None = None
    """Why the message was quarantined as a whole."""

    def __str__(self) -> str:
        if self.refused is not None:
            return f"quarantined: {self.refused}"
        return ", ".join(f"{handler} {outcome}" for handler, outcome in self.outcomes.items())


class NeverFinished(Exception):
    """Attempts were begun and nothing more was heard of them: each time the worker died."""


class Receiver:
    """Gives messages to the handlers of one service. Threads may share it."""

    def __init__(
        self,
        service: Service,
        engine: Engine | Callable[[], Engine],
        settings: ReceiveSettings | None = None,
        *,
        interrupts: tuple[type[BaseException], ...] = (),
        on_due: Callable[[], None] = lambda: None,
        random: Random | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """*interrupts*: exceptions that a signal may raise anywhere, such as soft time limits.

        *on_due* is called after a commit that left something to be delivered at once.
        """
        self.service = service
        self.settings = settings or ReceiveSettings()
        self._random = random or Random()  # noqa: S311 - spreads retries
        self._now = now
        self._transactions = Transactions(
            engine,
            patience=self.settings.patience,
            tries=self.settings.tries,
            interrupts=interrupts,
            on_due=on_due,
            sleep=sleep,
        )

    def receive(
        self,
        body: bytes,
        *,
        handler: str | None = None,
        key_seq: int | None = None,
        redelivered: bool = False,
        headers: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Give the envelope in *body* to *handler*, or to each that subscribes to its type.

        *redelivered*: the broker has handed it out before, so it may have killed a worker.
        *headers* are kept with a message that is quarantined. Raises `NotSettled`.
        """
        if handler == pending.EVERY_HANDLER:
            return self._receive_redriven(body, key_seq, headers)
        return self._receive(body, handler, key_seq, redelivered, headers, is_redriven=False)

    def quarantine(
        self,
        body: bytes,
        reason: str,
        headers: Mapping[str, Any] | None = None,
        *,
        key_seq: int | None = None,
    ) -> Receipt:
        """Keep a message that is not even an envelope. Raises `NotSettled`."""
        name, schema = self.service.name, self.service.schema
        log.error("message quarantined: %s", reason)

        def put(session: Session) -> None:
            quarantine.put(
                session, name, body, reason, headers=headers, key_seq=key_seq, schema=schema
            )

        self._transactions.settled(put)
        return Receipt(refused=reason)

    def _receive(
        self,
        body: bytes,
        handler: str | None,
        key_seq: int | None,
        redelivered: bool,
        headers: Mapping[str, Any] | None,
        *,
        is_redriven: bool,
    ) -> Receipt:
        try:
            envelope = decode(body, self.settings.limits)
            handlers = [self._named(handler)] if handler else self._subscribed(envelope)
            if not handler and not is_redriven:
                self._refuse_forgotten(envelope)
        except MalformedMessage as error:
            return self.quarantine(body, str(error), headers, key_seq=key_seq)
        payload = _Payload(envelope, self.service.registry)
        outcomes = {
            one.name: self._deliver(
                Work(
                    self.service, one, envelope, key_seq,
                    addressed=handler is not None, limits=self.settings.transaction,
                ),
                payload,
                redelivered,
            )
            for one in handlers
        }  # fmt: skip
        return Receipt(envelope.id, envelope.type, outcomes)

    def _receive_redriven(
        self, body: bytes, key_seq: int | None, headers: Mapping[str, Any] | None
    ) -> Receipt:
        """Feed a quarantined message through; its note goes when all its handlers are settled."""
        id = quarantine.redrive_id(self.service.name, body)
        schema, lease = self.service.schema, self.settings.transaction.lease
        noted = self._transactions.settled(
            lambda session: pending.begin_attempt(
                session, pending.EVERY_HANDLER, id, lease, schema=schema
            )
        )
        if noted is None:
            return Receipt(outcomes={pending.EVERY_HANDLER: Outcome.STALE})
        if noted.number > self.service.retry.attempts:
            reason = "each time it was fed through, the worker died"
            receipt = self.quarantine(body, reason, key_seq=key_seq)
        else:
            receipt = self._receive(body, None, key_seq, False, headers, is_redriven=True)
        self._transactions.settled(
            lambda session: pending.withdraw(session, pending.EVERY_HANDLER, id, schema=schema)
        )
        return receipt

    # ---- which handlers ----

    def _named(self, name: str) -> Handler:
        return self.service.handler(name) or self.service.stand_in(name)

    def _subscribed(self, envelope: Envelope) -> list[Handler]:
        handlers = list(self.service.handlers_for(envelope.type))
        if not handlers:
            raise UnknownEventType(
                f"no handler of service {self.service.name} takes {envelope.type!r}; "
                f"it takes: {', '.join(self.service.bindings) or 'nothing'}"
            )
        return handlers

    def _refuse_forgotten(self, envelope: Envelope) -> None:
        born = created_at(envelope.id) or envelope.time
        if self._now() - born > self.settings.dedupe_window:
            raise MalformedMessage(
                f"event {envelope.type} {envelope.id} is of {born:%Y-%m-%d}, beyond the dedupe "
                f"window of {self.settings.dedupe_window.days} days: nobody knows any more whether "
                "it was handled"
            )

    # ---- one delivery ----

    def _deliver(self, work: Work, payload: _Payload, redelivered: bool) -> Outcome:
        number, noted = 1, False
        if work.addressed or redelivered or work.handler.owns_transactions:
            begun = self._transactions.settled(lambda session: attempt.note(session, work))
            if isinstance(begun, Outcome):
                return begun
            number, noted = begun.number, True
            if number > work.handler.retry.attempts:
                return self._give_up(work, payload, begun)
        try:
            event = payload.read_for(work.handler)
        except MalformedMessage as error:
            return self._unreadable(work, number, error)
        try:
            result = self._act_outside(work, event, number)
            if isinstance(result, Outcome):
                return result
            outcome = self._transactions.retried(
                lambda session: attempt.deliver(
                    session, work, event, number, noted=noted, result=result
                )
            )
        except NotSettled:
            raise
        except Busy:
            return self._put_off(work, number)
        except Exception as error:
            return self._failed(work, event, number, error)
        crash_point("receive.committed")
        return outcome

    def _act_outside(self, work: Work, event: object, number: int) -> Any:
        """The result of the call that a handler makes outside of any transaction, if it makes one."""
        if not work.handler.owns_transactions:
            return None
        call = self._transactions.retried(
            lambda session: attempt.prepare(session, work, event, number)
        )
        if call is None or isinstance(call, Outcome):
            return call
        crash_point("receive.prepared")
        result = call()
        crash_point("receive.called")
        return result

    def _unreadable(self, work: Work, number: int, error: MalformedMessage) -> Outcome:
        if work.addressed:
            return self._failed(work, None, number, error)
        try:
            return self._transactions.settled(
                lambda session: attempt.refuse_unreadable(session, work, number, error)
            )
        except Busy:
            return self._put_off(work, number)

    def _give_up(self, work: Work, payload: _Payload, begun: pending.Noted) -> Outcome:
        limit = work.handler.retry.attempts
        error = NeverFinished(
            f"{begun.number - 1} attempts were begun, none finished; the last error noted: "
            f"{begun.error or 'none, the worker died each time'}"
        )
        # Reading it may be what kills the worker: then the next time it is parked unread.
        event = payload.read_or_none() if begun.number == limit + 1 else None
        return self._failed(work, event, begun.number, error)

    def _failed(self, work: Work, event: object, number: int, error: Exception) -> Outcome:
        try:
            return self._transactions.settled(
                lambda session: attempt.settle_failure(
                    session, work, event, number, error, self._random
                )
            )
        except Busy:
            return self._put_off(work, number)

    def _put_off(self, work: Work, number: int) -> Outcome:
        delay = work.limits.lease * (0.25 + self._random.random() / 2)
        return self._transactions.settled(
            lambda session: attempt.put_off(session, work, number, delay)
        )


@dataclass
class _Payload:
    """The payload object, made when the first handler is about to run, once for all of them."""

    envelope: Envelope
    registry: Registry

    @cached_property
    def event(self) -> Any:
        return self.registry.read(self.envelope.type, self.envelope.version, self.envelope.data)

    def read_for(self, handler: Handler) -> Any:
        """Raises `MalformedMessage` where it cannot be read, or not into what *handler* takes."""
        if handler.versions:
            read_as = self.registry.of(self.event)
            if (read_as.name, read_as.version) not in handler.versions:
                taken = sorted(v for name, v in handler.versions if name == read_as.name)
                raise UnknownEventType(
                    f"{handler.name} takes {read_as.name} in versions {taken}, not in "
                    f"{read_as.version}: add an upcaster from it, or subscribe to it"
                )
        return self.event

    def read_or_none(self) -> Any:
        try:
            return self.event
        except MalformedMessage:
            return None
