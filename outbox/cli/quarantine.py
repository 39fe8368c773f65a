"""`outbox quarantine`: look at messages that could not be read, feed them through again, or not."""

from __future__ import annotations

from typing import Any

import click

from outbox import quarantine
from outbox.cli import options
from outbox.cli.bodies import envelope_of
from outbox.cli.output import (
    Problem,
    confirm,
    console,
    first_line,
    not_found,
    print_json,
    print_table,
    printable,
    reporting_problems,
)
from outbox.quarantine import Quarantined


@click.group("quarantine", short_help="Messages that no handler could be given.")
def command() -> None:
    """Messages that could not be read or were not meant for here, kept byte by byte."""


@command.command("list")
@options.database_url()
@options.schema
@click.option("--service", help="Only this service's.")
@click.option("--before", type=int, metavar="ID", help="Older than this one: the next page.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@options.as_json
@reporting_problems
def list_command(
    database_url: str,
    schema: str,
    service: str | None,
    before: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """List quarantined messages, newest first."""
    with options.session(database_url, "quarantine list") as session:
        messages = quarantine.list_messages(
            session, service=service, before=before, limit=limit, schema=schema
        )
    if as_json:
        print_json({"quarantined": [_summary(each) for each in messages]})
        return
    print_table(
        ["id", "last seen", "times", "service", "bytes", "reason"],
        [
            [
                each.id,
                each.last_seen,
                each.times_seen,
                each.service,
                len(each.body),
                first_line(each.reason),
            ]
            for each in messages
        ],
        title=f"Quarantined messages: {len(messages)}",
    )


@command.command("show")
@click.argument("id", type=int)
@options.database_url()
@options.schema
@options.as_json
@reporting_problems
def show_command(id: int, database_url: str, schema: str, as_json: bool) -> None:
    """Show one message: why it is here, its headers and its bytes."""
    with options.session(database_url, "quarantine show") as session:
        message = quarantine.show(session, id, schema=schema)
    if message is None:
        not_found(f"quarantined message {id} in schema {schema!r}")
    if as_json:
        print_json(
            {
                **_summary(message),
                "headers": message.headers,
                "body": envelope_of(message.body),
            }
        )
        return
    out = console()
    for name, value in {**_summary(message), "headers": message.headers}.items():
        out.print(f"[bold]{name:>10}[/]  ", end="")
        out.print(printable(str(value)), markup=False, soft_wrap=True)
    out.print("\n[bold]body[/]")
    out.print(printable(envelope_of(message.body)), markup=False, soft_wrap=True)


@command.command("redrive")
@click.argument("id", type=int)
@options.database_url()
@options.schema
@options.yes
@options.as_json
@reporting_problems
def redrive_command(id: int, database_url: str, schema: str, yes: bool, as_json: bool) -> None:
    """Feed a message through again, to every handler of its type: after a deploy that can read it.

    An event older than the dedupe window is run even if it was handled before.
    """
    confirm(
        f"Feed message {id} through again? If it is older than the dedupe window, "
        "nobody knows whether it was handled before.",
        yes=yes,
    )
    with options.session(database_url, "quarantine redrive") as session:
        try:
            done = quarantine.redrive(session, id, schema=schema)
        except ValueError as error:
            raise Problem(str(error)) from error
    _done("redriven", done, id, as_json=as_json)


@command.command("discard")
@click.argument("id", type=int)
@options.database_url()
@options.schema
@click.option("--reason", required=True, help="Why; it goes to the log.")
@options.as_json
@reporting_problems
def discard_command(id: int, database_url: str, schema: str, reason: str, as_json: bool) -> None:
    """Delete a message for good."""
    with options.session(database_url, "quarantine discard") as session:
        done = quarantine.discard(session, id, reason, schema=schema)
    _done("discarded", done, id, as_json=as_json)


def _done(verb: str, done: bool, id: int, *, as_json: bool) -> None:
    if not done:
        not_found(f"quarantined message {id}")
    if as_json:
        print_json({verb: 1})
    else:
        click.echo(f"1 {verb}")


def _summary(message: Quarantined) -> dict[str, Any]:
    return {
        "id": message.id,
        "service": message.service,
        "reason": message.reason,
        "times_seen": message.times_seen,
        "first_seen": message.first_seen,
        "last_seen": message.last_seen,
        "bytes": len(message.body),
        "sha256": message.digest.hex(),
    }
