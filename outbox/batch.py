"""Several deliveries in one transaction: one insert into the inbox, one commit.

What goes wrong in it, whatever it is, takes the whole transaction back, and then each delivery is
run alone by the one path that knows how to retry, park and put off: so a failing handler hurts no
other, and there are no savepoints to pay for when all is well, which is nearly always.

Why this is as safe as one by one: a handler runs exactly for the (event, handler) pairs whose inbox
rows this transaction inserted, and its writes commit with them or not at all. A pair that is in the
inbox already, or that is owed or parked, is left out by the insert and settled alone. Two batches
that hold the same pairs wait for each other in the order of the keys, and run their handlers in the
order of sagas and event keys, so that rows named by those are locked in one order; any deadlock that
handlers make beyond that ends one transaction, and its deliveries are run alone.

Only what needs no transaction of its own takes part: not what was redelivered, nor what is owed and
was sent or begun before (it may have killed a worker, which is counted first), nor what is ordered or
unreadable. The first run of what is owed takes its note along: the statement that inserts the inbox
row deletes the note, and where another transaction has changed that in the same moment, the batch
ends and each of its deliveries is run alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from outbox.context import handling
from outbox.crash_points import crash_point
from outbox.errors import MalformedMessage
from outbox.intake import Incoming, Intake, Payload
from outbox.pending import EVERY_HANDLER
from outbox.service import Delivery, Handler
from outbox.statements import statement
from outbox.work import TransactionLimits, Work

# Locks the inbox rows first and the notes after them, as a delivery that runs alone does. One subplan
# for each row, by CASE: what a join would make of it hangs on statistics that a queue outruns.
_ENTER = """
WITH entered AS (
    INSERT INTO {schema}.inbox (event_id, handler, digest)
    SELECT new.event_id, new.handler, new.digest
    FROM unnest(CAST(:event_ids AS uuid[]), CAST(:handlers AS text[]), CAST(:digests AS bytea[]),
        CAST(:addressed AS boolean[])) AS new (event_id, handler, digest, is_addressed)
    WHERE CASE WHEN new.is_addressed THEN EXISTS (
        SELECT FROM {schema}.pending_delivery AS owed
        WHERE owed.handler = new.handler AND owed.event_id = new.event_id
            AND owed.attempts = 0 AND owed.sends <= 1)
    ELSE NOT EXISTS (
        SELECT FROM {schema}.pending_delivery AS owed
        WHERE owed.handler = new.handler AND owed.event_id = new.event_id)
    AND NOT EXISTS (
        SELECT FROM {schema}.dead_letter AS parked
        WHERE parked.handler = new.handler AND parked.event_id = new.event_id)
    END
    ORDER BY new.event_id, new.handler
    ON CONFLICT DO NOTHING
    RETURNING event_id, handler
), withdrawn AS (
    DELETE FROM {schema}.pending_delivery AS owed USING entered
    WHERE owed.handler = entered.handler AND owed.event_id = entered.event_id
        AND owed.attempts = 0 AND owed.sends <= 1
    RETURNING owed.event_id, owed.handler
)
SELECT entered.event_id, entered.handler, withdrawn.event_id IS NOT NULL AS was_owed
FROM entered LEFT JOIN withdrawn
    ON withdrawn.event_id = entered.event_id AND withdrawn.handler = entered.handler
"""


Pair = tuple[UUID, str]
"""Event id and name of the handler: the key of the inbox."""


class NoteChanged(Exception):
    """A delivery that is owed was begun, sent again or withdrawn while a batch entered it."""


@dataclass(frozen=True)
class Plan:
    """A message that can be handled together with others."""

    payload: Payload
    works: Sequence[Work]


class Batch:
    """The deliveries among some messages that can share a transaction."""

    def __init__(
        self, intake: Intake, messages: Sequence[Incoming], limits: TransactionLimits
    ) -> None:
        self._intake = intake
        self._limits = limits
        self._plans: dict[int, Plan] = {}
        planned: set[UUID] = set()
        for message in messages:
            plan = self._planned(message)
            # A second copy is taken in alone, after the first: it is no first delivery.
            if plan is not None and plan.payload.envelope.id not in planned:
                planned.add(plan.payload.envelope.id)
                self._plans[id(message)] = plan

    def plan_for(self, message: Incoming) -> Plan | None:
        """None for a message that has to be taken in alone."""
        return self._plans.get(id(message))

    def __len__(self) -> int:
        return sum(len(plan.works) for plan in self._plans.values())

    def deliver(self, session: Session) -> Collection[Pair]:
        """Run the handlers of all that was never delivered before; returns what that was.

        Raises whatever any of them raises: then nothing of it may be committed.
        """
        self._limits.impose(session)
        entered = self._enter(session)
        crash_point("receive.batch_begun")
        runs = list(self._in_lock_order(entered))
        self._intake.service.begin_batch([one for _, given in runs for one in given], session)
        for handler, deliveries in runs:
            self._run(handler, deliveries, session)
        crash_point("receive.batch_handled")
        return entered

    def _planned(self, message: Incoming) -> Plan | None:
        if message.redelivered or message.key_seq is not None or message.handler == EVERY_HANDLER:
            return None
        try:
            envelope, handlers = self._intake.read(message)
            payload = Payload(envelope, self._intake.service.registry)
            for handler in handlers:
                payload.read_for(handler)
        except MalformedMessage:
            return None
        if any(handler.owns_transactions for handler in handlers):
            return None
        service, limits, addressed = self._intake.service, self._limits, message.handler is not None
        return Plan(
            payload,
            [Work(service, one, envelope, None, addressed, limits) for one in handlers],
        )

    def _enter(self, session: Session) -> Collection[Pair]:
        works = {work.pair: work for plan in self._plans.values() for work in plan.works}
        rows = session.execute(
            statement(_ENTER, self._intake.service.schema),
            {
                "event_ids": [work.envelope.id for work in works.values()],
                "handlers": [work.handler.name for work in works.values()],
                "digests": [work.envelope.digest for work in works.values()],
                "addressed": [work.addressed for work in works.values()],
            },
        )
        entered = {(row.event_id, row.handler): row.was_owed for row in rows}
        for pair, was_owed in entered.items():
            if works[pair].addressed and not was_owed:
                raise NoteChanged(f"{works[pair]} is no longer owed as it was")
        return entered.keys()

    def _in_lock_order(self, entered: Collection[Pair]) -> Iterator[tuple[Handler, list[Delivery]]]:
        """One delivery at a time, then those whose handlers take all of theirs at once.

        The sort is stable: events of one key stay in the order they came in.
        """
        lock_order = self._intake.service.lock_order
        all_at_once: dict[str, tuple[Handler, list[Delivery]]] = {}
        for plan in sorted(
            self._plans.values(), key=lambda plan: lock_order(plan.payload.envelope)
        ):
            for work in plan.works:
                if work.pair not in entered:
                    continue
                handler = work.handler
                delivery = Delivery(work.envelope, plan.payload.event, 1, handler.name)
                if handler.run_all is None:
                    yield handler, [delivery]
                else:
                    all_at_once.setdefault(handler.name, (handler, []))[1].append(delivery)
        for name in sorted(all_at_once):
            yield all_at_once[name]

    def _run(self, handler: Handler, deliveries: list[Delivery], session: Session) -> None:
        if handler.run_all is not None:
            handler.run_all(deliveries, session)
            session.flush()
        else:
            (delivery,) = deliveries
            with handling(delivery.envelope, self._intake.service.name):
                handler.run(delivery, session)
                session.flush()
        session.expunge_all()  # the next one reads for itself, as in a session of its own
