"""`saga peers` and `saga retire`: whom reverse unwinding waits for."""

from __future__ import annotations

import click

from outbox.cli import options
from outbox.cli.output import not_found, print_json, print_table, reporting_problems
from outbox.status import plural


@click.command("peers")
@options.database_url()
@options.schema
@options.as_json
@reporting_problems
def peers_command(database_url: str, schema: str, as_json: bool) -> None:
    """List the participants that each participant here knows, and the events that they answer.

    When a saga is undone, a step waits for whoever answers its events.
    """
    from saga.retiring import known_peers

    with options.session(database_url, "saga peers") as session:
        known = known_peers(session, schema=schema)
    if as_json:
        print_json([dict(zip(("participant", "peer", "takes"), one, strict=True)) for one in known])
        return
    rows = [[participant, peer, ", ".join(takes)] for participant, peer, takes in known]
    print_table(["participant", "knows", "which answers"], rows, title=f"Peers: {len(rows)}")


@click.command("retire")
@click.argument("peer")
@options.database_url()
@options.schema
@options.as_json
@reporting_problems
def retire_command(peer: str, database_url: str, schema: str, as_json: bool) -> None:
    """Wait for the participant PEER no longer: it is gone for good.

    Run it on the database of every participant. A PEER that comes back introduces itself anew.
    """
    from saga.retiring import forget_peer

    with options.database(database_url, "saga retire") as engine:
        forgotten = forget_peer(engine, peer, schema=schema)
    if not forgotten:
        not_found(f"participant {peer} among those known in schema {schema!r}")
    if as_json:
        print_json(forgotten)
        return
    for participant, sagas in forgotten.items():
        click.echo(
            f"{participant} waits for {peer} no longer; looked at {plural(sagas, 'saga')} being undone"
        )
