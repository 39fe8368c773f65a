"""Workers of `tests/apps/ledger.py` as processes, and the source whose events they book."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kombu import Connection
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

import outbox
from outbox.buses import open_bus
from outbox.buses.topology import Topology, declare, kombu_queue
from outbox.relay import Relay
from tests.apps import ledger
from tests.relaying import running
from tests.workers import Worker


class Bank:
    """A source: events and a relay that carries them to an exchange of its own."""

    def __init__(self, database_url: str, broker_url: str) -> None:
        self.engine: Engine = create_engine(database_url)
        self.broker_url = broker_url
        self.exchange = f"x{uuid.uuid4().hex[:10]}"
        self.published = 0

    def move(self, *accounts: str, amounts: range, cls: type = ledger.Moved) -> None:
        """One transaction for each amount, with an event for each account."""
        for amount in amounts:
            with Session(self.engine) as session, session.begin():
                events = [cls(account=account, amount=amount) for account in accounts]
                outbox.publish_all(session, events, registry=ledger.registry)
            self.published += len(accounts)

    @contextmanager
    def relaying(self) -> Iterator[Relay]:
        # Without rolls, so that there is nothing but events in the queues.
        with running(self.engine, open_bus(self.broker_url, self.exchange), rolls=None) as relay:
            yield relay
        self.engine.dispose()


class Ledger:
    """A service of that bank under a name of its own: a database, and workers that declare its queue."""

    def __init__(self, bank: Bank, database_url: str, directory: Path) -> None:
        self.name = f"l{uuid.uuid4().hex[:10]}"
        self.engine: Engine = create_engine(database_url)
        self.database_url = database_url
        self._directory = directory
        self._environment = {
            "LEDGER_NAME": self.name,
            "LEDGER_EXCHANGE": bank.exchange,
            "LEDGER_BROKER": bank.broker_url,
            "LEDGER_DATABASE": database_url,
            "OUTBOX_TEST": "1",
        }
        types = tuple(event_type.name for event_type in ledger.registry)
        self._topology = Topology(f"{self.name}.events", types, bank.exchange, "classic")
        self._broker_url = bank.broker_url
        self._connection = Connection(bank.broker_url)
        self._queue = kombu_queue(self._topology)
        self._workers: list[Worker] = []
        self.run(ledger.TABLES)

    def declare(self) -> None:
        """The queue and its bindings, as its first worker would: events pile up from now on."""
        declare(self._broker_url, self._topology)

    def worker(self, *options: str) -> Worker:
        """Start one and wait until it consumes."""
        name = f"{self.name}-{len(self._workers)}"
        options = ("--hostname", f"{name}@localhost", *options)
        log = self._directory / f"{name}.log"
        worker = Worker(log, options, self._environment, app="tests.apps.ledger")
        self._workers.append(worker)
        worker.wait_until_ready()
        return worker

    def queued(self) -> int:
        """Messages in its queue, which is declared."""
        with self._connection.channel() as channel:
            declared: Any = self._queue(channel).queue_declare()
        return int(declared.message_count)

    def close(self) -> None:
        for worker in self._workers:
            if worker.is_alive:
                worker.kill()
        channel: Any
        with self._connection.channel() as channel:
            for queue in (self._queue.name, f"{self.name}.tasks"):
                channel.queue_delete(queue)
        self._connection.release()
        self.engine.dispose()

    # ---- its books ----

    def refuse(self, account: str, amount: int) -> None:
        self.run(f"INSERT INTO refused VALUES ('{account}', {amount})")

    def booked(self) -> dict[str, list[int]]:
        """The amounts of each account, in the order of booking."""
        booked: dict[str, list[int]] = defaultdict(list)
        for row in self.rows("SELECT account, amount FROM booking ORDER BY at"):
            booked[row.account].append(row.amount)
        return dict(booked)

    def explain(self) -> Any:
        return self.booked(), [worker.log[-3_000:] for worker in self._workers]

    def rows(self, sql: str) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql)))

    def run(self, sql: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(sql))
