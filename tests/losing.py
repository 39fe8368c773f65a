"""A source and a subscriber, each with a database, and between them a broker that loses what a test wants lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import outbox
from outbox import subscriptions
from outbox.buses.base import OutgoingMessage
from outbox.buses.topology import Topology
from outbox.envelope import decode
from outbox.events import Registry
from outbox.receive import Receiver, ReceiveSettings
from outbox.rolls import Roll, is_control
from outbox.rolls import decode as decode_control
from outbox.service import RetryPolicy, Service
from outbox.vigil import Vigil
from tests.relaying import relaying
from tests.workers import eventually

SOON = timedelta(milliseconds=100)
registry = Registry()


@registry.event("thing.made", key="key")
@dataclass
class Made:
    number: int
    key: int


@registry.event("thing.sold", key="key")
@dataclass
class Sold:
    number: int
    key: int


def nothing(_: OutgoingMessage) -> bool:
    return False


def is_roll(message: OutgoingMessage) -> bool:
    return is_control(message.body)


def number_of(message: OutgoingMessage) -> int | None:
    return None if is_roll(message) else decode(message.body).data["number"]


@dataclass
class Wire:
    """A broker that gives each message to the subscriber when it confirms it, unless it is to be lost."""

    hand_over: Callable[[OutgoingMessage], None]
    loses: Callable[[OutgoingMessage], bool] = nothing
    sent: list[OutgoingMessage] = field(default_factory=list)
    lost: list[OutgoingMessage] = field(default_factory=list)
    unrouted: dict[str, int] = field(default_factory=dict)

    def declare(self, topology: Topology) -> None: ...

    def send(self, batch: Sequence[OutgoingMessage]) -> _Handed:
        return _Handed(self, batch)

    def keep_alive(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Handed:
    wire: Wire
    batch: Sequence[OutgoingMessage]

    def wait(self) -> None:
        batch, self.batch = self.batch, ()
        for message in batch:
            self.wire.sent.append(message)
            if self.wire.loses(message):
                self.wire.lost.append(message)
            else:
                self.wire.hand_over(message)


class Pair:
    """A source with a relay and a subscriber, each with a database of its own."""

    def __init__(self, source: Engine, subscriber: Engine) -> None:
        self.source_engine, self.engine = source, subscriber
        self.source = Service("things", registry=registry)
        self.subscriber = Service(
            "stock", registry=registry, retry=RetryPolicy(1, timedelta(0), timedelta(0))
        )
        settings = ReceiveSettings(missed_after=SOON)
        self.subscriber.on(Made, Sold, name="stock.count")(self._count)
        self.fails_on: set[int] = set()
        self.receiver = Receiver(self.subscriber, subscriber, settings)
        self.source_receiver = Receiver(self.source, source, settings)
        self.vigil = Vigil(self.subscriber, subscriber, self._ask, patience=SOON)
        self.wire = Wire(self._hand_over)
        self.asks = 0
        self.run("CREATE TABLE effect (number int)")
        self.note()

    def note(self) -> None:
        """As their workers do when they start."""
        for engine, service in (self.engine, self.subscriber), (self.source_engine, self.source):
            with Session(engine) as session, session.begin():
                subscriptions.note(session, service)

    def _count(self, event: Any, session: Session) -> None:
        if event.number in self.fails_on:
            raise ValueError("cannot be counted")
        session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": event.number})

    def _hand_over(self, message: OutgoingMessage) -> None:
        if message.queue in (None, self.subscriber.queue):
            self.receiver.receive(message.body, key_seq=message.key_seq)

    def _ask(self, queue: str, body: bytes) -> None:
        assert queue == self.source.queue
        self.asks += 1
        self.source_receiver.receive(body)

    def publish(self, *numbers: int, cls: type = Made) -> None:
        with Session(self.source_engine) as session, session.begin():
            outbox.publish_all(
                session, [cls(number, number % 7) for number in numbers], registry=registry
            )

    @contextmanager
    def relaying(self, **settings: Any) -> Iterator[None]:
        options = {"rolls": SOON, "standings": (SOON,), **settings}
        with relaying(self.source_engine, self.wire, **options):
            yield

    def lose_for_good(self, number: int, *, of: Sequence[int]) -> None:
        """Publish *of*, all of which arrive but *number*, which is in the log no more when it is asked for."""
        self.wire.loses = lambda message: number_of(message) == number
        with self.relaying():
            self.publish(*of)
            self.until_taken(len(of))
            position = self.wire.lost[0].position
            self.run(
                f"DELETE FROM outbox.outbox_event WHERE position = {position}", self.source_engine
            )

            def is_gone() -> bool:
                self.vigil.look()
                return bool(self.holes) and self.holes[0].gone_at is not None

            eventually(is_gone, 20, lambda: self.holes)

    @property
    def effects(self) -> list[int]:
        return sorted(row.number for row in self.rows("SELECT number FROM effect"))

    @property
    def holes(self) -> list[Any]:
        return self.rows("SELECT * FROM outbox.awaited")

    def rows(self, sql: str, engine: Engine | None = None) -> list[Any]:
        with (engine or self.engine).connect() as connection:
            return list(connection.execute(text(sql)))

    def run(self, sql: str, engine: Engine | None = None) -> None:
        with (engine or self.engine).begin() as connection:
            connection.execute(text(sql))

    def until_whole(self, *numbers: int) -> None:
        """Every effect once, and nothing missed any more."""

        def whole() -> bool:
            self.vigil.look()
            return self.effects == sorted(numbers) and not self.holes

        eventually(whole, 30, lambda: (self.effects, self.holes, self.wire.lost))

    def until_taken(self, count: int) -> None:
        """Until rolls have named that many events to the subscriber."""

        def named() -> int:
            rolls = [
                decode_control(one.body)
                for one in self.wire.sent
                if is_roll(one) and one not in self.wire.lost
            ]
            return len({n.event_id for r in rolls if isinstance(r, Roll) for n in r.named()})

        eventually(lambda: named() >= count, 20, lambda: (named(), self.wire.sent))


class Once:
    """Loses what is picked, but only the first time it is sent."""

    def __init__(self, picks: Callable[[OutgoingMessage], bool]) -> None:
        self._picks = picks
        self._had: set[Any] = set()

    def __call__(self, message: OutgoingMessage) -> bool:
        if message.id in self._had or not self._picks(message):
            return False
        self._had.add(message.id)
        return True
