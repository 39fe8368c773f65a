"""Receiving: from a message's bytes to a commit, after which the message can be acked.

`Receiver.receive` knows no broker and no Celery. When it returns, everything about the message is
settled in the database: handled, owed again, parked or quarantined. When it raises, the message
must go back to its queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import attempt, pending, quarantine, roll_call, rolls
from outbox.batch import Batch, Pair, Plan
from outbox.crash_points import crash_point
from outbox.errors import MalformedMessage
from outbox.intake import Incoming, Intake, Payload, id_in
from outbox.limits import DEFAULT_LIMITS, Limits
from outbox.service import Service
from outbox.transactions import NotSettled, Transactions
from outbox.work import Busy, Outcome, TransactionLimits, Work

log = logging.getLogger(__name__)

__all__ = ["Incoming", "NotSettled", "Outcome", "Receipt", "ReceiveSettings", "Receiver"]


@dataclass(frozen=True)
class ReceiveSettings:
    """How a worker receives."""

    dedupe_window: timedelta = timedelta(days=30)
    """How long the inbox remembers. An older event is quarantined, not run again."""
    patience: timedelta = timedelta(seconds=30)
    """How long a message waits in the worker for a database that is away, before it goes back."""
    tries: int = 5
    """Runs of one attempt that ends in a deadlock or a lost connection."""
    missed_after: timedelta = timedelta(seconds=15)
    """How long an event that its source says it sent may be on its way until it is asked for."""
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
    told: str | None = None
    """It was no event but one of the messages between relays and workers (`outbox.rolls`): what came of it."""

    def __str__(self) -> str:
        if self.refused is not None:
            return f"quarantined: {self.refused}"
        if self.told is not None:
            return self.told
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
        self._intake = Intake(service, self.settings.limits, self.settings.dedupe_window, now)
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

        What the arguments mean, `Incoming` says. Raises `NotSettled`.
        """
        return self.take_in(Incoming(body, handler, key_seq, redelivered, headers))

    def take_in(self, message: Incoming) -> Receipt:
        """Settle *message*, each handler in a transaction of its own. Raises `NotSettled`."""
        if rolls.is_control(message.body):
            return self._take_control(message.body)
        if message.handler == pending.EVERY_HANDLER:
            return self._receive_redriven(message)
        return self._receive(message)

    def take_in_batch(self, messages: Sequence[Incoming]) -> list[Receipt]:
        """Settle *messages*, as many as possible in one transaction; receipts in their order.

        What the one transaction leaves out, or all of it where it fails, is taken in one by one.
        Raises `NotSettled`: some may be settled then, which their redelivery will meet.
        """
        batch = Batch(self._intake, messages, self.settings.transaction)
        handled: Collection[Pair] = ()
        if len(batch) > 1:
            try:
                handled = self._transactions.once(batch.deliver)
                crash_point("receive.batch_committed")
            except Exception as error:
                log.info("batch of %d rolled back, each is run alone: %r", len(batch), error)
        return [self._settle_rest(one, batch.plan_for(one), handled) for one in messages]

    def quarantine(
        self,
        body: bytes,
        reason: str,
        headers: Mapping[str, Any] | None = None,
        *,
        key_seq: int | None = None,
        event_id: UUID | None = None,
    ) -> Receipt:
        """Keep a message that no handler can be given. Raises `NotSettled`."""
        name, schema = self.service.name, self.service.schema
        log.error("message quarantined: %s", reason)

        def put(session: Session) -> None:
            quarantine.put(
                session, name, body, reason, headers=headers, key_seq=key_seq, event_id=event_id,
                schema=schema,
            )  # fmt: skip

        self._transactions.settled(put)
        return Receipt(refused=reason)

    def _take_control(self, body: bytes) -> Receipt:
        try:
            message = rolls.decode(body)
        except MalformedMessage as error:
            return self.quarantine(body, str(error))
        who = roll_call.Subscriber(
            self.service.name,
            self.settings.missed_after,
            self.settings.dedupe_window,
            self.service.schema,
        )
        told = self._transactions.settled(lambda session: roll_call.take(session, who, message))
        return Receipt(told=told)

    def _settle_rest(
        self, message: Incoming, plan: Plan | None, handled: Collection[Pair]
    ) -> Receipt:
        if plan is None:
            return self.take_in(message)
        outcomes = {
            work.handler.name: Outcome.HANDLED
            if work.pair in handled
            else self._deliver(work, plan.payload, redelivered=False)
            for work in plan.works
        }
        return Receipt(plan.payload.envelope.id, plan.payload.envelope.type, outcomes)

    def _receive(self, message: Incoming, *, is_redriven: bool = False) -> Receipt:
        try:
            envelope, handlers = self._intake.read(message, is_redriven=is_redriven)
        except MalformedMessage as error:
            return self.quarantine(
                message.body,
                str(error),
                message.headers,
                key_seq=message.key_seq,
                event_id=id_in(message.body, self.settings.limits),
            )
        payload = Payload(envelope, self.service.registry)
        outcomes = {
            one.name: self._deliver(
                Work(
                    self.service, one, envelope, message.key_seq,
                    addressed=message.handler is not None, limits=self.settings.transaction,
                ),
                payload,
                message.redelivered,
            )
            for one in handlers
        }  # fmt: skip
        return Receipt(envelope.id, envelope.type, outcomes)

    def _receive_redriven(self, message: Incoming) -> Receipt:
        """Feed a quarantined message through; its note goes when all its handlers are settled."""
        id = quarantine.redrive_id(self.service.name, message.body)
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
            receipt = self.quarantine(message.body, reason, key_seq=message.key_seq)
        else:
            for_all = replace(message, handler=None, redelivered=False)
            receipt = self._receive(for_all, is_redriven=True)
        self._transactions.settled(
            lambda session: pending.withdraw(session, pending.EVERY_HANDLER, id, schema=schema)
        )
        return receipt

    # ---- one delivery ----

    def _deliver(self, work: Work, payload: Payload, redelivered: bool) -> Outcome:
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

    def _give_up(self, work: Work, payload: Payload, begun: pending.Noted) -> Outcome:
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
