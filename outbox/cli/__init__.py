"""The `outbox` command. The only part of the package that reads environment variables.

Exit codes: 0 all is well, 1 there is a problem, 2 the command was called wrongly. With `--json`,
standard output holds one JSON document and nothing else. A command's module is imported when the
command runs, so that `outbox --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

import click

_COMMANDS: Final = {
    "migrate": "Create or change the tables.",
    "relay": "Carry committed events to the broker.",
    "status": "Show what waits: events, deliveries, dead letters.",
    "doctor": "Check everything that could quietly break a promise.",
    "dead": "Deliveries that a handler failed for good.",
    "quarantine": "Messages that no handler could be given.",
    "adopt-cluster": "Go on after a restore into another PostgreSQL cluster.",
}


class _ByName(click.Group):
    """A group that knows its commands' names and one line each without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(f"outbox.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_ByName, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="outbox-saga", prog_name="outbox")
def main() -> None:
    """Events that exist exactly if their transaction committed.

    Databases and brokers are named by options, or by OUTBOX_DATABASE_URL, OUTBOX_BROKER_URL,
    OUTBOX_EXCHANGE and OUTBOX_SCHEMA. Each command has --json and its own --help.
    """
