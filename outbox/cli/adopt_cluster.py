"""`outbox adopt-cluster`: after a restore into another PostgreSQL cluster."""

from __future__ import annotations

import click

from outbox.cli import options
from outbox.cli.output import confirm, print_json, reporting_problems
from outbox.cluster import adopt
from outbox.schema import component


@click.command("adopt-cluster", short_help="Go on after a restore into another cluster.")
@options.database_url()
@options.schema
@options.yes
@options.as_json
@reporting_problems
def command(database_url: str, schema: str, yes: bool, as_json: bool) -> None:
    """Make a log that was restored from another PostgreSQL cluster this one's own.

    Stop every relay and every writer first. No event is lost; some may be sent again, which
    subscribers drop.
    """
    with options.database(database_url, "adopt-cluster") as engine:
        with engine.connect() as connection:
            component.check(connection, schema)
        confirm(
            f"Adopt the log in schema {schema!r} of database {engine.url.database!r}? "
            "Every relay and every writer must be stopped.",
            yes=yes,
        )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            adopt(driver, schema)
    if as_json:
        print_json({"adopted": schema})
    else:
        click.echo("adopted; relays and writers may start")
