"""`outbox status`: one verdict, then the numbers behind it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from outbox import status
from outbox.cli import options
from outbox.cli.output import ago, console, print_json, print_table, reporting_problems
from outbox.schema import component
from outbox.status import COUNTED_PER_LANE, Lane, Standing, plural


@click.command("status", short_help="Show what waits: events, deliveries, dead letters.")
@options.database_url()
@options.schema
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an event or a delivery may wait before that is a problem.",
)
@options.as_json
@reporting_problems
def command(database_url: str, schema: str, patience: float, as_json: bool) -> None:
    """Say whether events move, and if not, why. Exits 1 where there is a problem."""
    with options.database(database_url, "status") as engine, engine.connect() as connection:
        component.check(connection, schema)
        standing = status.read_standing(connection, schema)
    problems = list(standing.problems(timedelta(seconds=patience)))
    if as_json:
        print_json(_document(standing, problems))
    else:
        _print(standing, problems)
    if problems:
        raise SystemExit(1)


def _document(standing: Standing, problems: list[str]) -> dict[str, Any]:
    return {
        "problems": problems,
        "waiting": standing.waiting,
        "oldest_seconds": standing.oldest,
        "relays": sorted(map(str, standing.relays)),
        "lanes": standing.lanes,
        "pending": standing.pending,
        "dead": standing.dead,
        "quarantined": standing.quarantined,
        "missing": standing.missing,
    }


def _print(standing: Standing, problems: list[str]) -> None:
    out = console()
    if problems:
        for problem in problems:
            out.print(f"[bold red]PROBLEM[/] {problem}")
    else:
        out.print(f"[bold green]OK[/] {_calm(standing)}")
    out.print()
    print_table(
        ["lane", "waiting", "oldest", "delivered up to", "cursor stored", "relay", "host"],
        [
            [
                lane.lane,
                _counted(lane.waiting),
                lane.oldest,
                lane.cursor,
                lane.cursor_stored_at,
                _holder(lane),
                lane.host,
            ]
            for lane in standing.lanes
        ],
        title=f"Events waiting to be published: {standing.waiting:,}{_more(standing)}",
    )
    if standing.pending:
        print_table(
            ["service", "reason", "deliveries", "due now", "first due"],
            [
                [owed.service, owed.reason, owed.deliveries, owed.due, _due(owed.overdue)]
                for owed in standing.pending
            ],
            title="Deliveries owed",
        )
    if standing.dead:
        print_table(
            ["service", "handler", "letters", "oldest"],
            [[each.service, each.handler, each.letters, each.oldest] for each in standing.dead],
            title="Dead letters",
        )
    if standing.quarantined:
        print_table(
            ["service", "messages", "newest"],
            [[each.service, each.messages, each.newest] for each in standing.quarantined],
            title="Quarantine",
        )
    if standing.missing:
        print_table(
            ["service", "type", "asked for", "gone", "oldest", "first event"],
            [
                [each.service, each.type, each.holes, each.gone, each.oldest, each.first]
                for each in standing.missing
            ],
            title="Sent by their source, never here",
        )


def _calm(standing: Standing) -> str:
    carried = f"{plural(len(standing.relays), 'relay')} running"
    if not standing.waiting:
        return f"nothing waits; {carried}"
    return (
        f"{standing.waiting} events on their way, the oldest for {ago(standing.oldest)}; {carried}"
    )


def _more(standing: Standing) -> str:
    return "+" if any(lane.waiting >= COUNTED_PER_LANE for lane in standing.lanes) else ""


def _counted(events: int) -> str:
    return f"{events:,}{'+' if events >= COUNTED_PER_LANE else ''}"


def _holder(lane: Lane) -> str | None:
    if lane.relay_id is None:
        return None
    return f"{str(lane.relay_id)[-12:]}{'' if lane.relay_alive else ' (gone)'}"


def _due(overdue: timedelta) -> str:
    if overdue < timedelta(0):
        return f"in {ago(-overdue)}"
    return f"{ago(overdue)} ago"
