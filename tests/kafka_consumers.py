"""Processes of `tests/apps/billing.py` on any Kafka: `outbox consume`, and a relay or its bus alone to send by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, text

from outbox.buses.base import OutgoingMessage
from outbox.buses.kafka import KafkaBus
from outbox.envelope import Envelope
from outbox.writing import encode
from tests.apps import billing
from tests.kafka_brokers import Kafka
from tests.workers import ROOT, eventually

_COMMAND = "from outbox.cli import main; main()"


class BillingOnKafka:
    """The service `billing` under a name of its own: a database, topics, and consumers."""

    def __init__(self, database_url: str, kafka: Kafka, directory: Path) -> None:
        self.name = f"b{uuid.uuid4().hex[:10]}"
        self.queue = f"{self.name}.events"
        self.topic = f"{self.name}.exchange.order"
        self.kafka = kafka
        self.engine: Engine = create_engine(database_url)
        self.directory = directory
        self._environment = {
            "BILLING_NAME": self.name,
            "BILLING_DATABASE": database_url,
            "BILLING_DIRECTORY": str(directory),
            "OUTBOX_TEST": "1",
        }
        self.url = f"{kafka.url}&session.timeout.ms=2500&heartbeat.interval.ms=500"
        kafka.create_topic(self.topic, 4)
        kafka.create_topic(self.queue, 2)
        self.bus = KafkaBus(self.url, f"{self.name}.exchange")
        self._processes: list[Process] = []
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS effect (what text)"))

    def consumer(self, *options: str, ready: bool = True, **environment: str) -> Process:
        """Start a consumer and wait until it has partitions."""
        url = environment.pop("url", self.url)
        arguments = ("consume", "tests.apps.billing:app", "--broker-url", url, *options)
        process = self._start(*arguments, **environment)
        if ready:
            process.wait_until(" is read here")
        return process

    def relay(self) -> Process:
        """Start a relay from the service's own database to its exchange."""
        database = self.engine.url.render_as_string(hide_password=False)
        exchange = f"{self.name}.exchange"
        return self._start(
            "relay", "--database-url", database, "--broker-url", self.url, "--exchange", exchange
        )

    def _start(self, *arguments: str, **environment: str) -> Process:
        path = self.directory / f"{self.name}-{len(self._processes)}.log"
        process = Process(path, (*arguments, "--json"), {**self._environment, **environment})
        self._processes.append(process)
        return process

    def close(self) -> None:
        for one in self._processes:
            if one.is_alive:
                one.kill()
        self.bus.close()
        self.engine.dispose()

    def placed(self, order: str, do: str = "") -> Envelope:
        event = billing.Placed(order=order, do=do)
        return encode(billing.registry.of(event), event, source="orders")

    def send(self, *envelopes: Envelope, **attributes: Any) -> None:
        """To the exchange's topic, as a relay does, and confirmed."""
        self.bus.send(
            [
                OutgoingMessage(str(e.id), e.type, e.key, e.body, 0, 0, **attributes)
                for e in envelopes
            ]
        ).wait()

    @property
    def effects(self) -> list[str]:
        return [row.what for row in self.rows("SELECT what FROM effect ORDER BY what")]

    def await_effects(self, *expected: str, seconds: float = 30) -> None:
        """Wait for all of them, and see that there are no others."""
        wanted = sorted(expected)
        eventually(lambda: len(self.effects) >= len(wanted), seconds, self.logs)
        assert self.effects == wanted

    def logs(self) -> str:
        return "\n".join([str(self.effects), *(one.log for one in self._processes)])

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM outbox.{table}")[0][0])


class Process:
    """One process of the command `outbox`."""

    def __init__(self, log: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self._log_path = log
        self._output = log.with_suffix(".out")
        with log.open("wb") as errors, self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, said: str) -> None:
        eventually(lambda: said in self.log or not self.is_alive, 30, lambda: self.log)
        assert self.is_alive, self.log

    def terminate(self) -> dict[str, int]:
        """End it gracefully; returns what it says that it did."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log
        said: dict[str, int] = json.loads(self._output.read_text())
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def await_death(self) -> None:
        assert self.process.wait(30) == -signal.SIGKILL, self.log
