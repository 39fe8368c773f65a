"""`outbox audit`: is everything that was published where it belongs?"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import click

from outbox import auditing
from outbox.auditing import Database, Line
from outbox.cli import options
from outbox.cli.output import Problem, print_json, print_table, printable, reporting_problems
from outbox.schema import component
from outbox.status import plural


@click.command("audit", short_help="Compare what was published with what each service has.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    callback=options.urls_or_files,
    metavar="URL",
    help="A database whose events are to be looked for; again for more. URL or @FILE.",
)
@click.option(
    "--subscriber",
    "subscribers",
    multiple=True,
    required=True,
    callback=options.urls_or_files,
    metavar="URL",
    help="A database where they should be; again for more. URL or @FILE.",
)
@options.schema
@click.option(
    "--settle",
    type=click.FloatRange(min=0),
    default=auditing.SETTLE.total_seconds(),
    show_default=True,
    metavar="SECONDS",
    help="How long after it was sent an event may still be on its way.",
)
@click.option(
    "--window",
    type=click.FloatRange(min=0),
    default=auditing.WINDOW / timedelta(days=1),
    show_default=True,
    metavar="DAYS",
    help="The subscribers' dedupe window: older events their inboxes have forgotten.",
)
@click.option("--repair", is_flag=True, help="Have the sources' relays send what is missing.")
@click.option("--all", "everything", is_flag=True, help="Name every event that is missing.")
@options.as_json
@reporting_problems
def command(
    sources: tuple[str, ...],
    subscribers: tuple[str, ...],
    schema: str,
    settle: float,
    window: float,
    repair: bool,
    everything: bool,
    as_json: bool,
) -> None:
    """Compare what sources have sent with what subscribers have, from the databases alone.

    Each event that is retained in a source's log must be in the inbox of every handler that takes
    its type, or owed, parked or quarantined there. Exits 1 where any is missing. Of each line the
    first missing event is named, with --json the first ten, and with --all every one.
    """
    with ExitStack() as stack:
        lines = auditing.audit(
            [_open(stack, url, schema) for url in sources],
            [_open(stack, url, schema) for url in subscribers],
            settle=timedelta(seconds=settle),
            window=timedelta(days=window),
            repair=repair,
            keep=None if everything else auditing.KEPT,
        )
    missing = sum(line.missing for line in lines)
    if as_json:
        print_json({"missing": missing, "repairing": repair and bool(missing), "lines": lines})
    else:
        _print(lines, missing, repair=repair, everything=everything)
    if missing:
        raise SystemExit(1)


def _open(stack: ExitStack, url: str, schema: str) -> Database:
    engine = stack.enter_context(options.database(url, "audit"))
    connection = stack.enter_context(engine.begin())
    component.check(connection, schema)
    return Database(connection, schema)


def _print(lines: list[Line], missing: int, *, repair: bool, everything: bool) -> None:
    if not lines:
        raise Problem(
            "nothing to compare: no worker of these subscribers has noted what it takes (it does when it starts), or "
            "no relay of these sources has sent any of that yet"
        )
    print_table(
        ["source", "service", "handler", "type", "due", "missing", "first missing"],
        [_row(line) for line in lines],
        title=f"{plural(missing, 'event')} missing" if missing else "Nothing is missing",
    )
    if everything:
        for line in lines:
            for id in line.first:
                click.echo(printable(f"{id}  {line.type}  {line.handler}  {line.source}"))
    elif any(line.missing > 1 for line in lines):
        click.echo("--all names every one of them")
    if missing and repair:
        click.echo("the sources' relays send them again now; look again in a minute")
    elif missing:
        click.echo("--repair has the sources' relays send them again")


def _row(line: Line) -> list[Any]:
    first = str(line.first[0]) if line.first else None
    return [line.source, line.service, line.handler, line.type, line.due, line.missing, first]
