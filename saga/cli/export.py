"""`saga export`: a service's contract as a file, for checks in other repositories and of later versions."""

from __future__ import annotations

from pathlib import Path

import click

from outbox.cli.output import reporting_problems
from saga.cli.targets import one_contract


@click.command("export", short_help="Write a service's contract to a file.")
@click.argument("target")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@reporting_problems
def command(target: str, output: Path | None) -> None:
    """Write the contract of TARGET as JSON: its declarations, and the schemas of its events.

    The same declarations make the same file, so it can be committed and compared.
    """
    from saga.contract import to_json

    text = to_json(one_contract(target))
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
