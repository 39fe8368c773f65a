"""`saga graph`: the choreography as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from outbox.cli import options
from outbox.cli.output import print_json, reporting_problems
from saga.cli.targets import contracts, targets


@click.command("graph", short_help="Draw the choreography: Mermaid, dot, SVG.")
@targets
@click.option(
    "--format",
    "language",
    type=click.Choice(["mermaid", "dot", "svg"]),
    default="mermaid",
    show_default=True,
    help="svg needs Graphviz: its program dot, and the Python package graphviz.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@options.as_json
@reporting_problems
def command(targets: tuple[str, ...], language: str, output: Path | None, as_json: bool) -> None:
    """Draw who reacts to what. GitHub and GitLab show Mermaid in documents."""
    from saga import graph
    from saga.flow import Flow

    flow = Flow(contracts(targets))
    if as_json:
        print_json(graph.document(flow))
        return
    drawn = {
        "mermaid": lambda: graph.mermaid(flow).encode(),
        "dot": lambda: graph.dot(flow).encode(),
        "svg": lambda: graph.svg(flow),
    }[language]()
    if output is None:
        click.echo(drawn, nl=False)
    else:
        output.write_bytes(drawn)
