"""Real Celery workers of `tests/apps/billing.py`, as processes, with a queue to write to."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
from celery import Celery
from kombu import Connection
from sqlalchemy import Engine, create_engine, text

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import celery_message
from outbox.buses.topology import QueueType, Topology, kombu_queue
from outbox.envelope import Envelope
from outbox.writing import encode
from tests import doomed
from tests.apps import billing

R = TypeVar("R")
ROOT = Path(__file__).parent.parent


class Billing:
    """The service `billing` under a name of its own: a database, a queue, and workers."""

    def __init__(
        self,
        database_url: str,
        broker_url: str,
        directory: Path,
        *,
        queue_type: QueueType = "quorum",
    ) -> None:
        self.name = f"b{uuid.uuid4().hex[:10]}"
        self.queue = f"{self.name}.events"
        self.engine: Engine = create_engine(database_url)
        self.directory = directory
        self._environment = {
            "BILLING_NAME": self.name,
            "BILLING_BROKER": broker_url,
            "BILLING_DATABASE": database_url,
            "BILLING_DIRECTORY": str(directory),
            "BILLING_QUEUE": queue_type,
            "OUTBOX_TEST": "1",
        }
        self._topology = Topology(
            self.queue, ("order.placed", "order.stepped"), f"{self.name}.exchange", queue_type
        )
        self.connection = Connection(broker_url)
        self._workers: list[Worker] = []
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS effect (what text)"))
        self.declare()

    def declare(self) -> None:
        """The queue and its binding, as a relay would make them before any worker runs."""
        kombu_queue(self._topology)(self.connection.default_channel).declare()

    def worker(self, *options: str, **environment: str) -> Worker:
        """Start a worker and wait until it consumes."""
        name = f"{self.name}-{len(self._workers)}"
        options = ("--hostname", f"{name}@localhost", *(options or ("--concurrency", "2")))
        path = self.directory / f"{name}.log"
        worker = Worker(path, options, {**self._environment, **environment})
        self._workers.append(worker)
        worker.wait_until_ready()
        return worker

    def doomed(self, **environment: str) -> tuple[int | None, str]:
        """Run a worker in one process (solo) that a crash point ends; returns its exit code, and its log."""
        path = self.directory / f"{self.name}-doomed.log"
        settings = {**self._environment, **environment}
        code = doomed.exit_code(("--pool", "solo", "--loglevel", "INFO"), settings, path)
        return code, path.read_text(errors="replace")

    def kill_workers(self) -> None:
        """Until the broker knows, too: what it hands to the dead would come to others as redelivered."""
        for worker in self._workers:
            if worker.is_alive:
                worker.kill()
        eventually(lambda: self._declared().consumer_count == 0)

    def close(self) -> None:
        self.kill_workers()
        with self.connection.channel() as channel:
            kombu_queue(self._topology)(channel).delete()
            channel.queue_delete(f"{self.name}.tasks")
        self.connection.release()
        self.engine.dispose()

    @property
    def control(self) -> Any:
        """Celery's remote control of the workers."""
        return Celery(self.name, broker=self._environment["BILLING_BROKER"]).control

    @property
    def is_on_redis(self) -> bool:
        return self.connection.transport.driver_type == "redis"

    # ---- sending ----

    def placed(self, order: str, do: str = "") -> Envelope:
        event = billing.Placed(order=order, do=do)
        return encode(billing.registry.of(event), event, source="orders")

    def send(self, envelope: Envelope, **attributes: Any) -> None:
        """To the exchange, as a relay does."""
        message = celery_message(
            OutgoingMessage(
                str(envelope.id), envelope.type, envelope.key, envelope.body, 0, 0, **attributes
            )
        )
        self.publish(
            message.body,
            headers=message.headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
        )

    def publish(
        self,
        body: bytes | str,
        *,
        headers: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        content_encoding: str = "utf-8",
        **options: Any,
    ) -> None:
        """Anything, to the service's queue."""
        with self.connection.Producer(auto_declare=False) as producer:
            producer.publish(
                body,
                exchange="",
                routing_key=self.queue,
                headers=dict(headers or {}),
                content_type=content_type,
                content_encoding=content_encoding,
                delivery_mode=2,
                **options,
            )

    # ---- looking ----

    @property
    def effects(self) -> list[str]:
        return [row.what for row in self.rows("SELECT what FROM effect ORDER BY what")]

    def effects_of(self, *orders: str) -> list[str]:
        return [what for what in self.effects if what.split()[0] in orders]

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))

    def until_nothing_is_left(self) -> None:
        """Wait until the queue is empty and no delivery is owed."""
        eventually(lambda: self.queued() == 0)
        eventually(lambda: self.rows("SELECT 1 FROM outbox.pending_delivery") == [], 30)

    def until_a_handler_is_at_work(self, worker: Worker) -> None:
        """Wait for a handler that has written and now sleeps in its transaction."""
        at_work = (
            "SELECT 1 FROM pg_stat_activity "
            "WHERE datname = current_database() AND state = 'idle in transaction'"
        )
        eventually(lambda: self.rows(at_work), explain=lambda: worker.log)

    def queued(self) -> int:
        count: int = self._declared().message_count
        return count

    def _declared(self) -> Any:
        with self.connection.channel() as channel:
            return kombu_queue(self._topology)(channel).queue_declare()


class Worker:
    """One `celery worker` process with its children."""

    def __init__(
        self,
        log: Path,
        options: tuple[str, ...],
        environment: Mapping[str, str],
        *,
        app: str = "tests.apps.billing",
    ) -> None:
        self._log_path = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "celery", "-A", app, "worker",
                    "--without-gossip", "--without-mingle", "--without-heartbeat",
                    "--loglevel", "INFO", *options,
                ],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_until_ready(self) -> None:
        eventually(lambda: " ready." in self.log or not self.is_alive, 30, lambda: self.log)
        assert self.is_alive, self.log

    def task_id(self, event_type: str) -> str | None:
        """The Celery id of the first event of that type that was received."""
        found = re.search(rf"{event_type}\[([0-9a-f-]+)\] received", self.log)
        return found[1] if found else None

    def terminate(self) -> int:
        """A warm shutdown; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        eventually(lambda: not self.is_alive, 30, self._stuck)
        return self.process.wait()

    def _stuck(self) -> str:
        """The log, with where its main process is: Celery writes that on SIGUSR1."""
        length = len(self.log)
        self.process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(AssertionError):
            eventually(lambda: len(self.log) > length, 5)
        return self.log

    def processes(self) -> list[psutil.Process]:
        """Those of its pool."""
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """SIGKILL to the worker and all of its children, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def eventually(
    condition: Callable[[], R], seconds: float = 15, explain: Callable[[], object] = str
) -> R:
    """Wait until *condition* holds; returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {explain()}")
        time.sleep(0.02)
    return result
