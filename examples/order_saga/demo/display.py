"""What is shown while the demo runs: one line for each thing that happens, and a live view below them.

Where the output is no terminal, the view becomes a plain line every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.order_saga.demo.watch import Glance

PLAIN_LINE_EVERY_SECONDS = 5.0

STYLES = {
    "running": "green",
    "starting": "yellow",
    "killed": "bold red",
    "not started": "dim",
}


@dataclass(frozen=True)
class View:
    """What the live view shows."""

    total: int
    accepted: int
    glance: Glance
    services: Mapping[str, str]
    """State of each service, one of `STYLES`."""


class Display:
    """Prints with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()
        self._live: Live | None = None
        self._plain_line_due_at = 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def say(self, text: str, *, style: str = "") -> None:
        """One more thing that has happened."""
        line = Text(f"{self.elapsed:6.1f} s  ", style="dim") + Text(text, style=style)
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show views until the block ends."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def show(self, view: View) -> None:
        if self._live is not None:
            self._live.update(_drawn(view), refresh=True)
        elif time.monotonic() >= self._plain_line_due_at:
            self._plain_line_due_at = time.monotonic() + PLAIN_LINE_EVERY_SECONDS
            self.say(_in_one_line(view), style="dim")


def _drawn(view: View) -> Group:
    table = Table.grid(padding=(0, 2))
    for name, seen in view.glance.seen.items():
        state = view.services[name]
        table.add_row(
            Text(f"         {name}", style="bold"),
            Text(state, style=STYLES[state]),
            ProgressBar(
                total=view.total,
                completed=seen,
                width=40,
                complete_style=STYLES[state],
                finished_style="green",
            ),
            Text(f"{seen} orders", style="dim"),
        )
    glance = view.glance
    summary = Text.assemble(
        f"\n         {view.accepted} of {view.total} accepted:  ",
        (f"{glance.confirmed} confirmed", "green"),
        "  ",
        (f"{glance.cancelled} cancelled", "yellow"),
        "  ",
        (f"{glance.undecided} under way", "cyan"),
    )
    return Group("", table, summary)


def _in_one_line(view: View) -> str:
    glance = view.glance
    seen = ", ".join(f"{name} {count}" for name, count in glance.seen.items() if name != "order")
    return (
        f"{view.accepted} of {view.total} accepted, {glance.confirmed} confirmed, "
        f"{glance.cancelled} cancelled, {glance.undecided} under way (seen by {seen})"
    )
