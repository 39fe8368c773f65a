"""`saga canvas`: the choreography as a table."""

from __future__ import annotations

import sys

import click

from outbox.cli import options
from outbox.cli.output import print_json, print_table, reporting_problems
from saga.cli.targets import contracts, targets


@click.command("canvas", short_help="Print the choreography as a table.")
@targets
@options.as_json
@reporting_problems
def command(targets: tuple[str, ...], as_json: bool) -> None:
    """Print the saga canvas: step, participant, trigger, emits, rejects, compensation.

    On a terminal it is a table, otherwise Markdown, to be kept in a document and reviewed there.
    """
    from saga.canvas import COLUMNS, canvas, markdown
    from saga.flow import Flow

    rows = canvas(Flow(contracts(targets)))
    if as_json:
        print_json([dict(zip(COLUMNS, row, strict=True)) for row in rows])
    elif sys.stdout.isatty():
        print_table(COLUMNS, rows, title="Saga canvas")
    else:
        click.echo(markdown(rows), nl=False)
