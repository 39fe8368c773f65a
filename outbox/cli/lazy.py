"""A group of commands that are imported when they run, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click


@dataclass(frozen=True)
class Lazy:
    """A command that is not imported yet."""

    module: str
    help: str
    """One line for the list of commands."""
    attribute: str = "command"


class LazyGroup(click.Group):
    """A group that knows its commands' names and one line each without importing them."""

    def __init__(self, *args: Any, lazy: Mapping[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        known = self.lazy.get(cmd_name)
        if known is None:
            return None
        command = getattr(import_module(known.module), known.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, known.help) for name, known in self.lazy.items()])
