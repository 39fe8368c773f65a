"""The `outbox` command. The only part of the package that reads environment variables.

Exit codes: 0 all is well, 1 there is a problem, 2 the command was called wrongly. With `--json`,
standard output holds one JSON document and nothing else. A command's module is imported when the
command runs, so that `outbox --help` answers at once.
"""

from __future__ import annotations

from typing import Final

import click

from outbox.cli.lazy import Lazy, LazyGroup

_COMMANDS: Final = {
    "migrate": Lazy("outbox.cli.migrate", "Create or change the tables."),
    "relay": Lazy("outbox.cli.relay", "Carry committed events to the broker."),
    "consume": Lazy("outbox.cli.consume", "Handle a service's events from Kafka."),
    "status": Lazy("outbox.cli.status", "Show what waits: events, deliveries, dead letters."),
    "metrics": Lazy("outbox.cli.metrics", "Print or serve what status says, for Prometheus."),
    "doctor": Lazy("outbox.cli.doctor", "Check everything that could quietly break a promise."),
    "replay": Lazy("outbox.cli.replay", "Send retained events once more to one service."),
    "holes": Lazy("outbox.cli.holes", "Events that a source sent and that never came."),
    "audit": Lazy("outbox.cli.audit", "Compare what was published with what each service has."),
    "dead": Lazy("outbox.cli.dead", "Deliveries that a handler failed for good."),
    "quarantine": Lazy("outbox.cli.quarantine", "Messages that no handler could be given."),
    "adopt-cluster": Lazy(
        "outbox.cli.adopt_cluster", "Go on after a restore into another PostgreSQL cluster."
    ),
}


@click.command(
    cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="outbox-saga", prog_name="outbox")
def main() -> None:
    """Events that exist exactly if their transaction committed.

    Databases and brokers are named by options, or by OUTBOX_DATABASE_URL, OUTBOX_BROKER_URL,
    OUTBOX_EXCHANGE and OUTBOX_SCHEMA. Each command has its own --help and, but for metrics, --json.
    """
