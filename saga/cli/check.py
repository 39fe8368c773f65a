"""`saga check`: the faults of a choreography, each with file and line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from outbox.cli import options
from outbox.cli.output import print_json, printable, reporting_problems
from outbox.status import plural
from saga.cli.targets import contracts, targets

if TYPE_CHECKING:
    from saga.findings import Finding


@click.command("check", short_help="Find the faults of a choreography before it runs.")
@targets
@options.as_json
@reporting_problems
def command(targets: tuple[str, ...], as_json: bool) -> None:
    """Check the choreography that all TARGETs make together.

    One line for each finding: FILE:LINE: SEVERITY RULE: MESSAGE. Exits 1 where there is an error,
    0 with warnings only. Name every service that takes part: what one says, another must hear.
    """
    from saga.check import check

    report(check(contracts(targets)), as_json)


def report(findings: Sequence[Finding], as_json: bool) -> None:
    """Print what was found; exit 1 where there is an error."""
    errors = [one for one in findings if one.severity == "error"]
    warnings = len(findings) - len(errors)
    if as_json:
        documents = [one.document() for one in findings]
        print_json({"errors": len(errors), "warnings": warnings, "findings": documents})
    else:
        for one in findings:
            click.echo(printable(str(one)))
        click.echo(f"{plural(len(errors), 'error')}, {plural(warnings, 'warning')}", err=True)
    if errors:
        raise SystemExit(1)
