"""A whole choreography in one process, without a broker: the test itself decides what arrives when.

    play = Choreography({order: order_engine, inventory: inventory_engine})
    with Session(order_engine) as session, session.begin():
        order.start(session, OrderCreated(...))
    play.settle()

Participants, receiving, journal and databases are the real ones. What the relay and the broker
would do is done here: an event of any log becomes one message for each service that is bound to it,
and work that a service owes itself becomes a message to the handler that it is owed to. A message
stays known after its delivery, so it can be delivered again.

No time passes: what is due later (a deadline, a delayed step, a retry) is there at once, with its
time. `settle` comes to it when nothing else is left to be done; a test that wants it earlier
delivers it: ``play.deliver(play.owed("orders.give_up"))``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import pending
from outbox.receive import Receipt, Receiver, ReceiveSettings
from outbox.service import Service
from outbox.statements import statement
from saga.participant import Participant

_END_OF_LOG = "SELECT COALESCE(max(position), 0) FROM {schema}.outbox_event"
# By event id as well as by position: a transaction that began early may commit late.
_NEW_EVENTS = """
SELECT position, event_id, type, body FROM {schema}.outbox_event
WHERE position > :end ORDER BY position
"""
_EVERYTHING = 1_000_000
_LONG_SINCE = datetime.min.replace(tzinfo=UTC)
_NOW = timedelta(seconds=1)
"""What is due within it is due now; also for clocks that differ by a little."""
_LONG_AGO = UUID(int=0)

Choose = Callable[[Sequence["Message"]], "Message"]


@dataclass(frozen=True)
class Message:
    """One event on its way to one service, or (with *handler*) work that it owes to one handler."""

    service: str
    type: str
    event_id: UUID
    body: bytes
    handler: str | None = None
    due: datetime | None = field(default=None, compare=False)
    """Of work that is owed: when, where that is later than now."""

    def __str__(self) -> str:
        return f"{self.type} to {self.handler or self.service}"


def acquaint(services: Mapping[Service, Engine]) -> None:
    """Let the participants know each other, as their introductions would, and nobody else."""
    participants = [one for one in services if isinstance(one, Participant)]
    for participant in participants:
        with Session(services[participant]) as session, session.begin():
            journal = participant.journal(session)
            for name in journal.peers():
                journal.forget(name)
            for peer in participants:
                journal.know(peer.name, peer.answers, _LONG_AGO)


def soonest(waiting: Sequence[Message]) -> Message:
    """The oldest of those that are due; where none is, the one that will be first."""
    return min(waiting, key=lambda one: one.due or _LONG_SINCE)


class Choreography:
    """The services of a choreography with their databases, which they may share."""

    def __init__(
        self,
        services: Mapping[Service, Engine],
        *,
        settings: ReceiveSettings | None = None,
        from_the_beginning: bool = False,
        acquainted: bool = True,
    ) -> None:
        """Events that are in the logs already are left alone, unless *from_the_beginning*.

        The participants know each other, as after their introductions, unless not *acquainted*.
        """
        self.services = dict(services)
        self.receivers = {
            service.name: Receiver(service, engine, settings)
            for service, engine in services.items()
        }
        self.waiting: list[Message] = []
        """Messages that have not been delivered yet, oldest first."""
        self.delivered: list[Message] = []
        self._seen: set[UUID] = set()
        if acquainted:
            acquaint(services)
        self._ends = {log: 0 if from_the_beginning else self._end_of(*log) for log in self._logs()}

    def collect(self) -> Sequence[Message]:
        """Do what relays and sweepers do; returns all that waits, also what is due later."""
        for (engine, schema), end in self._ends.items():
            with Session(engine) as session:
                for row in session.execute(statement(_NEW_EVENTS, schema), {"end": end}):
                    self._route(row.type, row.event_id, bytes(row.body))
                for owed in pending.list_pending(session, limit=_EVERYTHING, schema=schema):
                    self._owe(owed)
        return self.waiting

    def take_over(self, other: Choreography) -> None:
        """Go on where *other* stands, over the same databases: as a deployment of another version."""
        other.collect()
        self.waiting = list(other.waiting)
        self.delivered = list(other.delivered)
        self._seen = set(other._seen)
        self._ends = dict(other._ends)

    def deliver(self, message: Message) -> Receipt:
        """Deliver *message*, whether for the first time or again. (Work that is owed no longer is
        not done again: it is received as stale.)"""
        if message in self.waiting:
            self.waiting.remove(message)
        self.delivered.append(message)
        return self.receivers[message.service].receive(message.body, handler=message.handler)

    def owed(self, handler: str) -> Message:
        """The first message that waits for that handler: "orders.give_up", for a deadline.

        Raises `LookupError`, naming what there is.
        """
        owed = [one for one in self.collect() if one.handler is not None]
        for message in owed:
            if message.handler == handler:
                return message
        there = ", ".join(sorted({str(one.handler) for one in owed})) or "nothing"
        raise LookupError(f"nothing is owed to {handler}; owed is {there}")

    def settle(self, choose: Choose = soonest, *, limit: int = 10_000) -> int:
        """Deliver until nothing waits any more; *choose* says what is next. Returns how many.

        Raises `RuntimeError` after *limit* deliveries.
        """
        for count in range(limit):
            if not self.collect():
                return count
            self.deliver(choose(self.waiting))
        raise RuntimeError(f"nothing has settled after {limit} deliveries: {self.waiting[:5]}")

    def _route(self, type: str, event_id: UUID, body: bytes) -> None:
        if event_id in self._seen:
            return
        self._seen.add(event_id)
        for service in self.services:
            if type in service.bindings:
                self.waiting.append(Message(service.name, type, event_id, body))

    def _owe(self, owed: pending.PendingDelivery) -> None:
        later = owed.next_attempt_at
        if later is not None and later < datetime.now(UTC) + _NOW:
            later = None
        message = Message(owed.service, owed.type, owed.event_id, owed.body, owed.handler, later)
        if owed.service in self.receivers and message not in self.waiting:
            self.waiting.append(message)

    def _logs(self) -> set[tuple[Engine, str]]:
        return {(engine, service.schema) for service, engine in self.services.items()}

    def _end_of(self, engine: Engine, schema: str) -> int:
        with Session(engine) as session:
            return int(session.execute(statement(_END_OF_LOG, schema)).scalar_one())
