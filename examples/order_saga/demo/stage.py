"""Where the demo plays: servers, migrated databases, and the services' processes, all gone at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from examples.order_saga.demo import services
from examples.order_saga.demo.guard import Guard
from examples.order_saga.demo.interrupts import ignoring_signals, pause
from examples.order_saga.demo.processes import stop_all
from examples.order_saga.demo.servers import (
    Databases,
    Server,
    check_broker,
    describe_broker,
    free_port,
    remove_queues,
    start_postgres,
    start_redis,
)
from examples.order_saga.demo.services import NAMES, QUEUES, Place, Service
from examples.order_saga.demo.shop import Shop


@dataclass(frozen=True)
class Stage:
    """All that is there before the first order."""

    services: dict[str, Service]
    database_urls: dict[str, str]
    broker_url: str
    base_url: str
    servers: str
    """Which servers these are, for people."""
    directory: Path
    """Where the logs are."""


@contextmanager
def stage(
    shop: Shop,
    *,
    database_url: str | None,
    broker_url: str | None,
    keep: bool,
    worker_options: Sequence[str] = services.THREADS,
) -> Iterator[Stage]:
    """Set up servers, databases and services, none of these started; leave nothing behind.

    With *keep*, the directory with logs and data stays, and so do databases on a server that was
    given. Raises `Unusable`, `ProcessFailed` and `Interrupted`.
    """
    with _tidied() as tidying:
        guard = Guard()
        tidying.callback(guard.dismiss)
        directory = _directory(tidying, guard, keep=keep)
        is_given = database_url is not None
        if database_url is None:
            database_url = _started(tidying, start_postgres(directory, guard, keep=keep))
        databases = Databases(database_url, run=token_hex(3))
        version = databases.version()
        if is_given and not keep:
            tidying.callback(databases.drop, NAMES)
        databases.create(NAMES)
        if broker_url is None:
            broker_url = _started(tidying, start_redis(directory, guard))
        else:
            check_broker(broker_url, QUEUES)
            tidying.callback(remove_queues, broker_url, QUEUES)
        database_urls = {name: databases.url(name) for name in NAMES}
        for name, url in database_urls.items():
            services.migrate(name, url, shop)
            pause(0)
        port = free_port()
        place = Place(database_urls, broker_url, directory, guard)
        made = services.make_services(place, port, worker_options)
        tidying.callback(lambda: stop_all(p for each in made.values() for p in each.processes))
        yield Stage(
            services=made,
            database_urls=database_urls,
            broker_url=broker_url,
            base_url=f"http://127.0.0.1:{port}",
            servers=f"PostgreSQL {version} and {describe_broker(broker_url)}",
            directory=directory,
        )


@contextmanager
def _tidied() -> Iterator[ExitStack]:
    """An exit stack whose end cannot be interrupted."""
    tidying = ExitStack()
    try:
        yield tidying
    finally:
        with ignoring_signals():
            tidying.close()


def _directory(tidying: ExitStack, guard: Guard, *, keep: bool) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="order-saga-"))
    directory.chmod(0o755)  # root runs PostgreSQL as another user, who lives in here too
    if not keep:
        guard.watch_directory(directory)
        tidying.callback(_remove, directory, guard)
    return directory


def _remove(directory: Path, guard: Guard) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    guard.forget_directory(directory)


def _started(tidying: ExitStack, server: Server) -> str:
    tidying.callback(stop_all, [server.process])
    return server.url
