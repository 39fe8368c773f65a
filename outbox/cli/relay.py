"""`outbox relay`: the relay as a process that a service manager starts and stops."""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict
from datetime import timedelta

import click

from outbox.buses import open_bus
from outbox.cli import options
from outbox.cli.output import masked, print_json, reporting_problems
from outbox.cli.process import collect_garbage_seldom, log_to_stderr, stop_on_signals
from outbox.relay import Relay, RelaySettings
from outbox.schema import component

log = logging.getLogger("outbox.relay")

_DAY = timedelta(days=1)
_DEFAULTS = RelaySettings()


@click.command("relay", short_help="Carry committed events to the broker.")
@options.database_url()
@options.broker_url()
@options.schema
@options.exchange
@click.option(
    "--retention",
    type=click.FloatRange(min=0),
    default=_DEFAULTS.retention / _DAY,
    show_default=True,
    metavar="DAYS",
    help="How long delivered events are kept, for replay.",
)
@click.option(
    "--prepare/--no-prepare",
    default=None,
    help="Prepare statements.  [default: unless a pooler is between]",
)
@click.option(
    "--mandatory",
    is_flag=True,
    help="RabbitMQ: have events that no queue is bound to returned, and say so.  [others always say]",
)
@options.log_level
@options.as_json
@reporting_problems
def command(
    database_url: str,
    broker_url: str,
    schema: str,
    exchange: str,
    retention: float,
    prepare: bool | None,
    mandatory: bool,
    log_level: str,
    as_json: bool,
) -> None:
    """Carry committed events to the broker until told to stop. Any number may run at once.

    SIGTERM or SIGINT ends it gracefully: what is under way is confirmed and stored, and the lanes
    go to the others. A second signal ends it at once; what was under way is sent again by whoever
    comes next. With --json the last line of output says what was done, and how many events of each type
    went nowhere for want of a queue.
    """
    log_to_stderr(log_level)
    collect_garbage_seldom()
    settings = RelaySettings(retention=retention * _DAY, prepare=prepare)
    bus = open_bus(broker_url, exchange, **({"mandatory": True} if mandatory else {}))
    relay = Relay(database_url, bus, schema=schema, settings=settings)
    stopping = threading.Event()
    stop_on_signals(relay.stop, stopping)
    _await_tables(database_url, schema, stopping)
    if not stopping.is_set():
        log.info("relaying schema %r to %s, exchange %r", schema, masked(broker_url), exchange)
        relay.run()
    log.info("stopped: %d events confirmed", relay.stats.confirmed)
    if as_json:
        print_json({**asdict(relay.stats), "unrouted": dict(bus.unrouted)})


def _await_tables(database_url: str, schema: str, stopping: threading.Event) -> None:
    """Wait for a database that is not up yet; one without our tables is a mistake."""
    from sqlalchemy.exc import OperationalError

    with options.database(database_url, "relay") as engine:
        while not stopping.is_set():
            try:
                with engine.connect() as connection:
                    component.check(connection, schema)
                return
            except OperationalError as error:
                log.warning("database: %s; trying again", str(error.orig).strip())
                stopping.wait(1)
