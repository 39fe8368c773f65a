"""The simulated world: services on model databases, a broker that delivers at least once and in any order, and time.

Only the broker, the relay and the clock are models here. Handlers, participants, inbox, journal, retries and dead
letters are the code that runs in production, on the SQL that it sends in production.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox import counting, pending, places
from outbox.receive import Incoming, Receiver
from outbox.service import Service
from saga.testing.model import ModelDatabase
from saga.testing.model.driver import engine_on
from saga.testing.processes import Hub

if TYPE_CHECKING:
    from collections.abc import Iterator

BEGINNING: Final = datetime(2030, 1, 1, tzinfo=UTC)
_RESEND: Final = timedelta(minutes=1)


@dataclass(frozen=True)
class Message:
    """One message in a queue."""

    type: str
    event_id: UUID
    body: bytes
    handler: str | None = None
    key_seq: int | None = None
    redelivered: bool = False

    def again(self) -> Message:
        """The same, as the broker delivers it a second time."""
        return replace(self, redelivered=True)

    def __str__(self) -> str:
        return f"{self.type} {str(self.event_id)[-4:]}" + (
            f" for {self.handler}" if self.handler else ""
        )


@dataclass
class SimulatedService:
    """A service as the simulation needs it: how its tables are made, and how they are filled."""

    service: Service
    create: Callable[[Engine], None] | None = None
    """Makes the service's own tables."""
    fill: Callable[[Session], None] | None = None
    """Writes what is there at the beginning."""
    workers: int = 2

    template: ModelDatabase = field(init=False, repr=False)
    current: ModelDatabase = field(init=False, repr=False)
    """The database of the run that is under way: the engine outlives it, with all the SQL that it has compiled."""
    engine: Engine = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.template = ModelDatabase(self.service.name, clock=lambda: BEGINNING)
        self.template.define(*_migrations(self.service.schema))
        self.current = self.template
        self.engine = engine_on(lambda: self.current.connect())
        if self.create is not None:
            self.create(self.engine)
        if self.fill is not None:
            with Session(self.engine) as session, session.begin():
                self.fill(session)


class Node:
    """One service in one run: its database, its queue, and what its relay has sent."""

    def __init__(self, simulated: SimulatedService, world: World) -> None:
        self.name = simulated.service.name
        self.service = simulated.service
        self.workers = simulated.workers
        self.world = world
        self.database = ModelDatabase(self.name, clock=lambda: world.now)
        self.database.storage.copy_from(simulated.template.storage)
        world.hub.attach(self.database)
        simulated.current = self.database
        self.engine = simulated.engine
        self.queue: list[Message] = []
        self.sent: set[int] = set()
        """Positions that the relay's cursor has passed."""
        self.down_for = 0.0
        """Turns for which the service is out; infinite: until nobody else has work."""
        # The scheduler asks at every turn, and a commit is what changes the answer.
        self._unsent: tuple[tuple[int, int], list[dict[str, Any]]] | None = None
        self._due: tuple[int, datetime | None] | None = None
        self.receiver = Receiver(self.service, self.engine, random=Random(0), sleep=world.sleep)  # noqa: S311

    # --- what its processes do

    def unsent(self) -> list[dict[str, Any]]:
        """Committed events that the relay's cursor has not passed, in the order of the log."""
        at = (self.database.storage.commits, len(self.sent))
        if self._unsent is None or self._unsent[0] != at:
            self._unsent = at, self._look_for_unsent()
        return self._unsent[1]

    def _look_for_unsent(self) -> list[dict[str, Any]]:
        table = self.database.storage.tables[f"{self.service.schema}.outbox_event"]
        rows = [row.committed for row in table.rows.values() if row.committed is not None]
        return sorted(
            (row for row in rows if row["position"] not in self.sent),
            key=lambda row: row["position"],
        )

    def relay(self) -> None:
        """Send a page, await the confirms, then move the cursor: what stops in between is sent again."""
        page = self.unsent()
        for row in page:
            self.world.publish(_message(row))
            self.world.hub.stop_at("relay.sent")
        self.world.hub.stop_at("relay.confirmed")
        self.sent.update(row["position"] for row in page)

    def receive(self, *messages: Message) -> None:
        """Handle messages, several in one transaction where that can be, and ack them.

        A worker that is killed before that leaves them to be delivered again.
        """
        incoming = [
            Incoming(one.body, one.handler, one.key_seq, one.redelivered) for one in messages
        ]
        if len(incoming) > 1:
            self.receiver.take_in_batch(incoming)
        else:
            self.receiver.take_in(incoming[0])
        for message in messages:
            self.world.hub.stop_at("before ack")
            self.world.acked(self, message)

    def sweep(self) -> None:
        """Send what is owed and due to the service's own queue."""
        with Session(self.engine) as session, session.begin():
            due = pending.claim_due(
                session,
                self.name,
                limit=100,
                resend_after=_RESEND,
                resend_cap=10 * _RESEND,
                schema=self.service.schema,
            )
        self.world.hub.stop_at("sweep.claimed")
        for owed in due:
            self.queue.append(
                Message(owed.type, owed.event_id, owed.body, owed.handler, owed.key_seq)
            )

    # --- what tests look at

    def next_due(self) -> datetime | None:
        """When the next owed delivery is due."""
        at = self.database.storage.commits
        if self._due is None or self._due[0] != at:
            self._due = at, self._look_for_due()
        return self._due[1]

    def _look_for_due(self) -> datetime | None:
        rows = self.rows("pending_delivery")
        return min(
            (row["next_attempt_at"] for row in rows if row["service"] == self.name), default=None
        )

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Committed rows of one of the package's own tables."""
        stored = self.database.storage.tables[f"{self.service.schema}.{table}"].rows.values()
        return [row.committed for row in stored if row.committed is not None]

    def query(self, sql: str, **params: Any) -> list[Any]:
        """Rows of a query on the service's database."""
        with Session(self.engine) as session:
            return list(session.execute(text(sql), params))


class World:
    """All services of one run, the messages under way and the clock."""

    def __init__(self, services: Sequence[SimulatedService]) -> None:
        # A schedule depends on its decisions, and on nothing that an earlier one has left.
        counting.BUSY.forget()
        places.BUSY.forget()
        self.now = BEGINNING
        self.hub = Hub()
        self.nodes = {one.service.name: Node(one, self) for one in services}
        self.in_hand: list[tuple[Node, Message]] = []
        """Messages that a worker has and has not acked."""
        self.trace: list[str] = []

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def publish(self, message: Message) -> None:
        """The topic exchange: a copy for each queue that is bound to the type."""
        for node in self.nodes.values():
            if message.type in node.service.bindings:
                node.queue.append(message)

    def acked(self, node: Node, message: Message) -> None:
        self.in_hand.remove((node, message))

    def sleep(self, _seconds: float) -> None:
        """A pause of the code under test: others run, and time passes with the timers."""
        self.hub.stop_at("pause")

    def say(self, what: str) -> None:
        self.trace.append(what)

    @contextmanager
    def session(self, name: str) -> Iterator[Session]:
        """A session on one service's database, for setting up and for looking."""
        with Session(self.nodes[name].engine) as session:
            yield session


def _message(row: dict[str, Any]) -> Message:
    return Message(row["type"], row["event_id"], row["body"], key_seq=row["key_seq"])


def _migrations(schema: str) -> list[str]:
    from outbox.schema.installed import installed_components

    return [
        statement.replace("{schema}", schema)
        for component in installed_components()
        for version in component.versions
        for statement in version.UP
    ]
