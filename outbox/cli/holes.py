"""`outbox holes`: what was sent and never came."""

from __future__ import annotations

import click

from outbox import holes
from outbox.cli import options
from outbox.cli.output import confirm, print_json, print_table, reporting_problems
from outbox.status import plural


@click.group("holes", short_help="Events that a source sent and that never came.")
def command() -> None:
    """Events that a source sent and that a handler here was not given in time.

    Workers ask for them again and again by themselves, ever less often, until they come.
    """


@command.command("list")
@options.database_url()
@options.schema
@click.option("--service", help="Only this service's.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@options.as_json
@reporting_problems
def list_command(
    database_url: str, schema: str, service: str | None, limit: int, as_json: bool
) -> None:
    """List them, longest missed first."""
    with options.session(database_url, "holes list") as session:
        found = holes.list_holes(session, service=service, limit=limit, schema=schema)
    if as_json:
        print_json({"holes": found})
        return
    print_table(
        [
            "missed since",
            "handler",
            "type",
            "event",
            "asked",
            "asked again at",
            "gone from the log",
        ],
        [
            [
                each.noticed_at,
                each.handler,
                each.type,
                each.event_id,
                each.asks,
                each.next_ask_at,
                each.gone_at,
            ]
            for each in found
        ],
        title=plural(len(found), "hole"),
    )


@command.command("forget")
@options.database_url()
@options.schema
@click.option("--service", help="Only this service's.")
@click.option("--reason", required=True, help="Why nobody needs them any more; it is logged.")
@options.yes
@options.as_json
@reporting_problems
def forget_command(
    database_url: str, schema: str, service: str | None, reason: str, yes: bool, as_json: bool
) -> None:
    """Forget events that are missed and that their source's log has no more.

    Ordered keys that waited for one of them go on.
    """
    confirm("Forget all events that are missed and can never be sent again?", yes=yes)
    with options.session(database_url, "holes forget") as session:
        done = holes.forget_gone(session, reason, service=service, schema=schema)
    if as_json:
        print_json({"forgotten": done.events, "keys": done.keys})
    else:
        click.echo(f"{plural(done.events, 'hole')} forgotten; {plural(done.keys, 'key')} go on")
