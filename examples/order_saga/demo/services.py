"""The five services as processes: a database, a worker and a relay each, and the API of one of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from examples.order_saga.demo import tally
from examples.order_saga.demo.guard import Guard
from examples.order_saga.demo.processes import Process, wait_until_ready
from examples.order_saga.demo.shop import TABLES, Shop
from outbox.schema.installed import installed_components

NAMES = ("order", "inventory", "users", "shipping", "analytics")
PUBLISHERS = ("order", "inventory", "users", "shipping")
"""Services with a relay; analytics has nothing to say."""
QUEUES = tuple(f"{name}.events" for name in NAMES)
ROOT = Path(__file__).parents[3]
THREADS = ("--pool", "threads", "--concurrency", "2")
REDELIVER_AFTER_SECONDS = 2
"""On Redis, after this what a killed worker had in hand is given out again, when a worker starts."""


@dataclass(frozen=True)
class Place:
    """Where the services find their servers, and where their processes live."""

    database_urls: Mapping[str, str]
    broker_url: str
    directory: Path
    guard: Guard


@dataclass
class Service:
    """One service's processes."""

    name: str
    worker: Process
    relay: Process | None
    api: Process | None
    started: bool = field(default=False, init=False)

    @property
    def processes(self) -> Iterator[Process]:
        return (each for each in (self.api, self.worker, self.relay) if each is not None)

    @property
    def is_ready(self) -> bool:
        """Whether its queue is bound and being read."""
        return self.worker.has_logged(" ready.")

    def wait_until_ready(self, within: float) -> None:
        """Raises `ProcessFailed` when its worker ends or takes too long."""
        wait_until_ready(self.worker, lambda: self.is_ready, within=within)

    def start(self) -> None:
        for process in self.processes:
            process.start()
        self.started = True

    def kill(self) -> None:
        """SIGKILL to each of its processes."""
        for process in self.processes:
            process.kill()
        self.started = False

    def check(self) -> None:
        """Raise `ProcessFailed` if one of its processes ended although nobody ended it."""
        if self.started:
            for process in self.processes:
                process.check()


def make_services(
    place: Place, api_port: int, worker_options: Sequence[str] = THREADS
) -> dict[str, Service]:
    """The services, none of them started."""
    return {
        name: Service(
            name,
            worker=_worker(name, place, worker_options),
            relay=_relay(name, place) if name in PUBLISHERS else None,
            api=_api(place, api_port) if name == "order" else None,
        )
        for name in NAMES
    }


def api_answers(client: httpx.Client) -> bool:
    try:
        nobody = client.get("/orders/00000000-0000-0000-0000-000000000000")
    except httpx.HTTPError:
        return False
    return nobody.status_code == httpx.codes.NOT_FOUND


def migrate(name: str, database_url: str, shop: Shop) -> None:
    """Make the tables of one service, ours and its own, and fill in what it begins with."""
    engine = create_engine(
        database_url.replace("postgresql:", "postgresql+psycopg:", 1), poolclass=NullPool
    )
    for component in installed_components():
        component.upgrade_engine(engine)
    TABLES[name].create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all(shop.rows(name))
    with psycopg.connect(database_url) as connection:
        connection.execute(tally.TABLE)


def _worker(name: str, place: Place, options: Sequence[str]) -> Process:
    return _process(
        f"{name}-worker",
        [
            *(sys.executable, "-m", "celery", "-A", f"examples.order_saga.{name}.app", "worker"),
            *(*options, "--hostname", f"{name}@demo"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            *("--loglevel", "INFO", "--include", tally.__name__),
        ],
        name,
        place,
    )


def _relay(name: str, place: Place) -> Process:
    return _process(
        f"{name}-relay",
        [sys.executable, "-c", "from outbox.cli import main; main()", "relay"],
        name,
        place,
    )


def _api(place: Place, port: int) -> Process:
    return _process(
        "order-api",
        [
            *(
                sys.executable,
                "-m",
                "uvicorn",
                "--factory",
                "examples.order_saga.order.api:create_app",
            ),
            *("--host", "127.0.0.1", "--port", str(port), "--no-access-log"),
        ],
        "order",
        place,
    )


def _process(name: str, command: list[str], service: str, place: Place) -> Process:
    environment = {
        "OUTBOX_DATABASE_URL": place.database_urls[service],
        "OUTBOX_BROKER_URL": place.broker_url,
        "REDIS_VISIBILITY_TIMEOUT": str(REDELIVER_AFTER_SECONDS),
        "PYTHONPATH": str(ROOT),
    }
    return Process(
        name,
        command,
        guard=place.guard,
        log=place.directory / f"{name}.log",
        directory=place.directory,
        environment=environment,
    )
