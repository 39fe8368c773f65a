"""`saga diff`: what open sagas would meet, were a new version deployed."""

from __future__ import annotations

import click

from outbox.cli import options
from outbox.cli.output import reporting_problems
from saga.cli.check import report
from saga.cli.targets import contracts, one_contract


@click.command("diff", short_help="Say what open sagas would meet in a new version.")
@click.argument("old")
@click.argument("new")
@options.as_json
@reporting_problems
def command(old: str, new: str, as_json: bool) -> None:
    """Compare the contract OLD (saga export wrote it) with NEW, a contract file or a target.

    Where NEW is a module with several services, the one with OLD's name is taken. Exits 1 where a
    saga that is open at the deployment would lose work or be stuck.
    """
    from saga.compare import compare

    before = one_contract(old)
    candidates = contracts([new])
    after = next((one for one in candidates if one.name == before.name), None)
    report(compare(before, after or one_contract(new)), as_json)
