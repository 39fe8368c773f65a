"""`outbox metrics`: how things stand, for Prometheus."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import options
from outbox.cli.output import reporting_problems
from outbox.cli.process import log_to_stderr, stop_on_signals
from outbox.errors import ConfigurationError
from outbox.schema import component

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


@click.command("metrics", short_help="Print or serve what status says, for Prometheus.")
@options.database_url()
@options.schema
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Serve /metrics here, until told to stop; 0 for any port.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to serve on.")
@options.log_level
@reporting_problems
def command(database_url: str, schema: str, port: int | None, host: str, log_level: str) -> None:
    """Print how things stand in Prometheus' text format, or serve it with --port.

    Printed, it is for the node exporter's textfile collector. One process for each database is enough.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise ConfigurationError(
            "prometheus_client is not installed: pip install 'outbox-saga[metrics]'"
        ) from error
    from outbox.metrics import StandingCollector

    log_to_stderr(log_level)
    with options.database(database_url, "metrics") as engine:
        registry = CollectorRegistry()
        registry.register(StandingCollector(engine, schema))
        if port is not None:
            _serve(registry, host, port)
            return
        with engine.connect() as connection:
            component.check(connection, schema)
        click.echo(generate_latest(registry).decode(), nl=False)


def _serve(registry: CollectorRegistry, host: str, port: int) -> None:
    from prometheus_client import start_http_server

    stopping = threading.Event()
    stop_on_signals(lambda: None, stopping)
    server: Any
    server, thread = start_http_server(port, host, registry)
    click.echo(f"http://{host}:{server.server_port}/metrics")
    stopping.wait()
    server.shutdown()
    thread.join()
