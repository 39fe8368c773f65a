"""`outbox consume`: a service's consumer on Kafka as a process."""

from __future__ import annotations

import logging
import os
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import options
from outbox.cli.output import CalledWrongly, masked, print_json, reporting_problems
from outbox.cli.process import log_to_stderr, stop_on_signals
from outbox.errors import ConfigurationError
from outbox.service import Service

if TYPE_CHECKING:
    from outbox.kafka import Consumer

log = logging.getLogger("outbox.consume")


@click.command("consume", short_help="Handle a service's events from Kafka.")
@click.argument("target", metavar="MODULE:NAME")
@options.broker_url()
@options.database_url(required=False)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1_000),
    default=1,
    show_default=True,
    help="Partitions that are worked on at a time, each in a thread.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Events of a partition that may be handled in one transaction, if so many wait.",
)
@options.log_level
@options.as_json
@reporting_problems
def command(
    target: str,
    broker_url: str,
    database_url: str | None,
    concurrency: int,
    batch: int,
    log_level: str,
    as_json: bool,
) -> None:
    """Handle a service's events from Kafka until told to stop. Any number may run at once.

    MODULE:NAME is the service (or a saga's participant), or a Celery app that
    outbox.celery.setup() was called with: then its database and its settings are taken, too. The
    processes of one service share the partitions of its topics.

    SIGTERM or SIGINT ends it gracefully: the event in hand is handled, and the partitions go to the
    others. A second signal ends it at once; what was in hand is handled elsewhere. With --json the
    last line of output says what was done.
    """
    log_to_stderr(log_level)
    consumer = _consumer(target, broker_url, database_url, concurrency, batch)
    stopping = threading.Event()
    stop_on_signals(consumer.stop, stopping)
    log.info("consuming from %s", masked(broker_url))
    consumer.run()
    log.info("stopped: %d records received", consumer.stats.received)
    if as_json:
        print_json(consumer.stats)


def _consumer(
    target: str, broker_url: str, database_url: str | None, concurrency: int, batch: int
) -> Consumer:
    try:
        from outbox.kafka import Consumer, ConsumerSettings
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"consuming from Kafka needs the package {error.name!r}: pip install 'outbox-saga[kafka]'"
        ) from error
    service, found = _load(target)
    if database_url is not None:
        found.pop("engine", None)
        found["database_url"] = database_url
    elif not found:
        raise click.UsageError("name the service's database: --database-url")
    consuming = ConsumerSettings(concurrency=concurrency, batch=batch)
    return Consumer(service, broker_url, consuming=consuming, **found)


def _load(target: str) -> tuple[Service, dict[str, Any]]:
    """The service that *target* names, and what its Celery app says besides, if it is one."""
    name, colon, attribute = target.partition(":")
    if not colon:
        raise click.UsageError(f"{target!r} names no service: expected MODULE:NAME")
    sys.path.insert(0, os.getcwd())
    try:
        named = getattr(import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise CalledWrongly(f"cannot load {target!r}: {error}") from error
    if isinstance(named, Service):
        return named, {}
    return _of_celery(named, target)


def _of_celery(app: Any, target: str) -> tuple[Service, dict[str, Any]]:
    from celery import Celery
    from sqlalchemy import Engine

    from outbox.celery import installed

    if not isinstance(app, Celery):
        raise CalledWrongly(
            f"{target} is a {type(app).__name__}: name a Service, a Participant or a Celery app"
        )
    app.loader.import_default_modules()
    made = installed(app)
    database = {"engine" if isinstance(made.database, Engine) else "database_url": made.database}
    return made.service, {**database, "settings": made.settings, "sweep": made.sweep}
