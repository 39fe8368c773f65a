"""`python -m examples.order_saga.demo`: the order saga on real servers, with a murder half way.

Exit codes: 0 the audit found nothing, 1 it found a violation, 2 the call was wrong, 3 the demo could
not be run, 128 + n it was ended by signal n.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from examples.order_saga.demo.display import Display
from examples.order_saga.demo.interrupts import Interrupted, heeding_signals
from examples.order_saga.demo.processes import ProcessFailed
from examples.order_saga.demo.report import print_report
from examples.order_saga.demo.servers import Unusable
from examples.order_saga.demo.shop import FEWEST_ORDERS, Shop
from examples.order_saga.demo.stage import stage
from examples.order_saga.demo.story import Story
from examples.order_saga.demo.summary import Summary, summarize

WIDTH_OF_A_PIPE = 120


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--orders",
    type=click.IntRange(min=FEWEST_ORDERS),
    default=200,
    show_default=True,
    help="How many orders to place.",
)
@click.option(
    "--per-second",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="How many of them in a second.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Other orders for each seed.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the figures to this file, too.",
)
@click.option(
    "--database-url",
    metavar="URL",
    help="A PostgreSQL server to make five databases on, and drop them again. [default: its own]",
)
@click.option(
    "--broker-url",
    metavar="URL",
    help="redis://... or amqp://... for the demo alone. [default: a Redis of its own]",
)
@click.option("--keep", is_flag=True, help="Leave logs and databases in place, and say where.")
def main(
    orders: int,
    per_second: float,
    seed: int,
    json_file: Path | None,
    database_url: str | None,
    broker_url: str | None,
    keep: bool,
) -> None:
    """Run five services, place orders, kill one service half way, and audit what is left."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)
    display = Display(console)
    shop = Shop.of(orders, seed)
    try:
        with heeding_signals():
            summary = _run(shop, per_second, display, database_url, broker_url, keep=keep)
    except Interrupted as interrupted:
        display.say(f"{interrupted}: every process was ended, nothing is left behind")
        sys.exit(128 + interrupted.number)
    except (ProcessFailed, Unusable) as problem:
        display.say("The demo could not be run", style="bold red")
        console.print(Text(str(problem)))
        sys.exit(3)
    print_report(console, summary)
    if json_file is not None:
        json_file.write_text(json.dumps(summary.as_json(), indent=2) + "\n")
    _conclude(display, summary)


def _run(
    shop: Shop,
    per_second: float,
    display: Display,
    database_url: str | None,
    broker_url: str | None,
    *,
    keep: bool,
) -> Summary:
    display.say("Starting servers, and migrating five databases")
    with stage(shop, database_url=database_url, broker_url=broker_url, keep=keep) as set_up:
        display.say(f"{set_up.servers}; one database and one queue for each of five services")
        if keep:
            display.say(f"Logs and data stay in {set_up.directory}")
        told = Story(set_up, shop, per_second, display).tell()
        return summarize(shop, told)


def _conclude(display: Display, summary: Summary) -> None:
    violations = len(summary.violations)
    if violations:
        display.say(f"{violations} violations", style="bold red")
        sys.exit(1)
    display.say("Every order ended whole. All processes are stopped.", style="bold green")


if __name__ == "__main__":
    main()
