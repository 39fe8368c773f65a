"""`outbox dead`: look at what a handler failed for good, give it back, or throw it away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from outbox import dead_letters
from outbox.cli import options
from outbox.cli.bodies import envelope_of
from outbox.cli.output import (
    confirm,
    console,
    first_line,
    not_found,
    print_json,
    print_table,
    printable,
    reporting_problems,
)
from outbox.dead_letters import DeadLetter, Matching
from outbox.status import plural

F = TypeVar("F", bound=Callable[..., Any])


def _filters(command: F) -> F:
    for name, words in (
        ("--key", "Only events with this key."),
        ("--type", "Only events of this type."),
        ("--handler", "Only this handler's."),
        ("--service", "Only this service's."),
    ):
        command = click.option(name, help=words)(command)
    return command


@click.group("dead", short_help="Deliveries that a handler failed for good.")
def command() -> None:
    """Deliveries that a handler failed too often, kept with their traceback for a person."""


@command.command("list")
@options.database_url()
@options.schema
@_filters
@click.option("--before", type=int, metavar="ID", help="Older than this one: the next page.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@options.as_json
@reporting_problems
def list_command(
    database_url: str,
    schema: str,
    before: int | None,
    limit: int,
    as_json: bool,
    **filters: str | None,
) -> None:
    """List dead letters, newest first."""
    matching = Matching(**filters)  # type: ignore[arg-type]  # click's names are its fields
    with options.session(database_url, "dead list") as session:
        letters = dead_letters.list_letters(
            session, matching, before=before, limit=limit, schema=schema
        )
        total = dead_letters.count(session, matching, schema=schema)
    if as_json:
        print_json({"total": total, "dead_letters": [_summary(each) for each in letters]})
        return
    print_table(
        ["id", "parked", "handler", "event", "key", "tries", "holds up", "error"],
        [
            [
                each.id,
                each.parked_at,
                each.handler,
                each.type,
                each.key,
                each.attempts,
                each.held_up or None,
                first_line(each.error),
            ]
            for each in letters
        ],
        title=f"Dead letters: {len(letters)} of {total}",
    )


@command.command("show")
@click.argument("id", type=int)
@options.database_url()
@options.schema
@options.as_json
@reporting_problems
def show_command(id: int, database_url: str, schema: str, as_json: bool) -> None:
    """Show one dead letter with its event and traceback."""
    with options.session(database_url, "dead show") as session:
        letter = dead_letters.show(session, id, schema=schema)
    if letter is None:
        not_found(f"dead letter {id} in schema {schema!r}")
    if as_json:
        print_json(
            {
                **_summary(letter),
                "traceback": letter.traceback,
                "envelope": envelope_of(letter.body),
            }
        )
        return
    out = console()
    for name, value in _summary(letter).items():
        out.print(f"[bold]{name:>10}[/]  ", end="")
        out.print(printable(str(value)), markup=False, soft_wrap=True)
    out.print("\n[bold]event[/]")
    out.print(printable(envelope_of(letter.body, indent=2)), markup=False, soft_wrap=True)
    out.print("\n[bold]traceback[/]")
    out.print(printable(letter.traceback), markup=False, soft_wrap=True)


@command.command("redrive")
@click.argument("id", type=int, required=False)
@options.database_url()
@options.schema
@_filters
@click.option("--all", "everything", is_flag=True, help="Every dead letter there is.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, oldest first.")
@options.yes
@options.as_json
@reporting_problems
def redrive_command(
    id: int | None,
    database_url: str,
    schema: str,
    everything: bool,
    limit: int | None,
    yes: bool,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Give dead letters to their handlers again, with all attempts before them."""
    matching = _meant(id, filters, everything=everything)
    _ask("Redrive", database_url, matching, schema, limit, yes=yes)
    with options.session(database_url, "dead redrive") as session:
        touched = dead_letters.redrive(session, matching, limit=limit, schema=schema)
    _done("redriven", touched, id, as_json=as_json)


@command.command("discard")
@click.argument("id", type=int, required=False)
@options.database_url()
@options.schema
@_filters
@click.option("--all", "everything", is_flag=True, help="Every dead letter there is.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, oldest first.")
@click.option("--reason", required=True, help="Why; it goes to the log.")
@options.yes
@options.as_json
@reporting_problems
def discard_command(
    id: int | None,
    database_url: str,
    schema: str,
    everything: bool,
    limit: int | None,
    reason: str,
    yes: bool,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Delete dead letters for good. Their handlers never see these events."""
    matching = _meant(id, filters, everything=everything)
    _ask("Discard for good", database_url, matching, schema, limit, yes=yes)
    with options.session(database_url, "dead discard") as session:
        touched = dead_letters.discard(session, matching, reason, limit=limit, schema=schema)
    _done("discarded", touched, id, as_json=as_json)


def _meant(id: int | None, filters: dict[str, str | None], *, everything: bool) -> Matching:
    matching = Matching(id=id, **filters)
    if matching.is_everything and not everything:
        raise click.UsageError("say which: an ID, a filter such as --handler, or --all")
    return matching


def _ask(
    verb: str, database_url: str, matching: Matching, schema: str, limit: int | None, *, yes: bool
) -> None:
    if matching.id is not None or yes:
        return
    with options.session(database_url, "dead") as session:
        meant = dead_letters.count(session, matching, schema=schema)
    meant = meant if limit is None else min(meant, limit)
    if meant:
        confirm(f"{verb} {plural(meant, 'dead letter')}?", yes=False)


def _done(verb: str, touched: int, id: int | None, *, as_json: bool) -> None:
    if id is not None and touched == 0:
        not_found(f"dead letter {id}")
    if as_json:
        print_json({verb: touched})
    else:
        click.echo(f"{touched} {verb}")


def _summary(letter: DeadLetter) -> dict[str, Any]:
    shown = vars(letter).copy()
    del shown["body"], shown["traceback"]
    return shown
