"""The `saga` command: what a choreography is, checked and drawn, and where its sagas stand.

Exit codes and `--json` are as for `outbox`: 0 all is well, 1 there is a problem, 2 called wrongly.
"""

from __future__ import annotations

from typing import Final

import click

from outbox.cli.lazy import Lazy, LazyGroup

_COMMANDS: Final = {
    "check": Lazy("saga.cli.check", "Find the faults of a choreography before it runs."),
    "export": Lazy("saga.cli.export", "Write a service's contract to a file."),
    "diff": Lazy("saga.cli.diff", "Say what open sagas would meet in a new version."),
    "canvas": Lazy("saga.cli.canvas", "Print the choreography as a table."),
    "graph": Lazy("saga.cli.graph", "Draw the choreography: Mermaid, dot, SVG."),
    "list": Lazy("saga.cli.standing", "List sagas.", "list_command"),
    "show": Lazy("saga.cli.standing", "Show one saga and what it waits for.", "show_command"),
    "stuck": Lazy("saga.cli.standing", "List sagas that wait for a person.", "stuck_command"),
    "resume": Lazy("saga.cli.operating", "Try again what is stuck.", "resume_command"),
    "abort": Lazy("saga.cli.operating", "Abort a running saga and undo it.", "abort_command"),
    "resolve": Lazy(
        "saga.cli.operating", "Say whether a call outside took effect.", "resolve_command"
    ),
    "skip-compensation": Lazy(
        "saga.cli.operating", "Count a step as undone by hand.", "skip_compensation_command"
    ),
    "peers": Lazy("saga.cli.peers", "List who waits for whom.", "peers_command"),
    "retire": Lazy("saga.cli.peers", "Wait for a participant no longer.", "retire_command"),
}


@click.command(
    cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="outbox-saga", prog_name="saga")
def main() -> None:
    """Sagas that always end, completed or undone.

    check, export, diff, canvas and graph read declarations: a TARGET is module:attribute, a module
    (all participants and services in it), or a contract file (.json).

    The others work on one database, named by --database-url or OUTBOX_DATABASE_URL. Each
    participant knows its own part of a saga: ask each database, or the observer.
    """
