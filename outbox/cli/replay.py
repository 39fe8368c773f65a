"""`outbox replay`: retained events, sent once more to one service."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from outbox.buses import open_bus
from outbox.cli import options
from outbox.cli.output import Problem, print_json, print_table, reporting_problems
from outbox.errors import BusError
from outbox.replaying import Progress, Replay, Selection
from outbox.schema import component
from outbox.status import plural

_AGO = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|d)")
_UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days"}
_BEGINNING = "beginning"
_TELL_EVERY = 10_000


def _moment(
    _context: click.Context, _option: click.Parameter, given: str | None
) -> datetime | None:
    if given is None or given == _BEGINNING:
        return None
    ago = _AGO.fullmatch(given)
    if ago:
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
    try:
        return datetime.fromisoformat(given).astimezone()
    except ValueError:
        raise click.BadParameter(
            f"{given!r} is no time: 2026-01-31T12:00, 90min, 36h, 2d or {_BEGINNING}"
        ) from None


@click.command("replay", short_help="Send retained events once more to one service.")
@options.database_url()
@options.broker_url()
@options.schema
@click.option(
    "--type",
    "types",
    multiple=True,
    required=True,
    help="Events of this type; again for more types.",
)
@click.option(
    "--since",
    default=_BEGINNING,
    show_default=True,
    callback=_moment,
    metavar="TIME",
    help="From this time on: 2026-01-31T12:00, 36h (ago), or `beginning` for all that is retained.",
)
@click.option(
    "--until", callback=_moment, metavar="TIME", help="Up to this time; now, if not given."
)
@click.option(
    "--to", "service", required=True, metavar="SERVICE", help="The service that is to get them."
)
@click.option("--queue", help="Its queue, where that is not SERVICE.events.")
@click.option(
    "--after",
    type=click.IntRange(min=0),
    default=0,
    metavar="POSITION",
    help="Only what lies behind this position: to go on where a replay was broken off.",
)
@click.option("--dry-run", is_flag=True, help="Only say how many there are.")
@options.as_json
@reporting_problems
def command(
    database_url: str,
    broker_url: str,
    schema: str,
    types: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    service: str,
    queue: str | None,
    after: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send events that are still in the log of this database once more, to one service only.

    What the service has had before, its inbox drops; so a replay may overlap, be repeated and be
    broken off at any time. Events beyond the service's dedupe window are quarantined there.
    """
    queue = queue or f"{service}.events"
    selection = Selection(types, since, until, after)
    with options.database(database_url, "replay") as engine:
        with engine.connect() as connection:
            component.check(connection, schema)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            driver: Any = connection.connection.driver_connection
            replay = Replay(driver, selection, schema=schema)
            if dry_run:
                _tell_counts(replay.count(), types, as_json)
                return
            sent = _send(replay, broker_url, queue, Progress(0, after))
    if as_json:
        print_json({"sent": sent.sent, "position": sent.position, "queue": queue})
    else:
        click.echo(f"{plural(sent.sent, 'event')} sent to {queue}, up to position {sent.position}")


def _send(replay: Replay, broker_url: str, queue: str, progress: Progress) -> Progress:
    bus = open_bus(broker_url)
    told = 0
    try:
        for step in replay.send(bus, queue):
            progress = step
            if progress.sent - told >= _TELL_EVERY:
                told = progress.sent
                click.echo(f"{told:,} sent, up to position {progress.position}", err=True)
    except BusError as error:
        raise Problem(
            f"{error}. {progress.sent:,} were sent; go on with --after {progress.position}"
        ) from error
    finally:
        bus.close()
    return progress


def _tell_counts(counts: dict[str, int], types: tuple[str, ...], as_json: bool) -> None:
    found = {type: counts.get(type, 0) for type in types}
    if as_json:
        print_json({"events": found})
    else:
        print_table(
            ["type", "events"], [[type, count] for type, count in found.items()], title="To be sent"
        )
