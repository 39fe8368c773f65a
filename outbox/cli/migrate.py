"""`outbox migrate`: bring the tables of every installed component to a version, or print the SQL."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import options
from outbox.cli.output import confirm, print_json, print_table, reporting_problems
from outbox.schema import Component, Status
from outbox.schema.installed import installed_components
from outbox.sql import in_schema

if TYPE_CHECKING:
    from sqlalchemy import Engine


@click.command("migrate", short_help="Create or change the tables.")
@options.database_url(required=False)
@options.schema
@click.option("--component", metavar="NAME", help="Only this one; otherwise all installed ones.")
@click.option("--to", type=click.IntRange(min=0), metavar="N", help="Stop at this version.")
@click.option("--downgrade", is_flag=True, help="Go back, by default to before the first version.")
@click.option("--check", is_flag=True, help="Change nothing; exit 1 when there is work to do.")
@click.option("--sql", "as_sql", is_flag=True, help="Print the SQL instead of running it.")
@click.option(
    "--from", "from_", type=click.IntRange(min=0), metavar="N", help="With --sql: where it starts."
)
@options.yes
@options.as_json
@reporting_problems
def command(
    database_url: str | None,
    schema: str,
    component: str | None,
    to: int | None,
    downgrade: bool,
    check: bool,
    as_sql: bool,
    from_: int | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Create the tables of every installed component, or bring them up to date.

    Each component is one transaction, and a second run does nothing. Versions are counted per
    component, so --to and --from need --component where several are installed.
    """
    components = _chosen(component)
    if (to is not None or from_ is not None) and len(components) > 1:
        names = ", ".join(each.name for each in components)
        raise click.UsageError(f"--to and --from count per component: add --component ({names})")
    if as_sql:
        click.echo(_offline_sql(components, schema, to, from_, downgrade=downgrade), nl=False)
        return
    if from_ is not None:
        raise click.UsageError("--from goes with --sql; otherwise the database knows")
    if database_url is None:
        raise click.UsageError("name the database: --database-url or OUTBOX_DATABASE_URL")
    with options.database(database_url, "migrate") as engine:
        before = _statuses(engine, components, schema)
        if check:
            _report(before, before, as_json=as_json)
            if any(status.behind for status in before):
                raise SystemExit(1)
            return
        if downgrade:
            _ask(engine, components, schema, to or 0, yes=yes)
            for each in reversed(components):
                each.downgrade_engine(engine, schema=schema, to=to or 0)
        else:
            for each in components:
                each.upgrade_engine(engine, schema=schema, to=to)
        _report(before, _statuses(engine, components, schema), as_json=as_json)


def _chosen(name: str | None) -> Sequence[Component]:
    installed = installed_components()
    if name is None:
        return installed
    chosen = [each for each in installed if each.name == name]
    if not chosen:
        names = ", ".join(each.name for each in installed)
        raise click.BadParameter(
            f"{name!r} is not installed; there are {names}", param_hint="--component"
        )
    return chosen


def _offline_sql(
    components: Sequence[Component],
    schema: str,
    to: int | None,
    from_: int | None,
    *,
    downgrade: bool,
) -> str:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    printed = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql",
        opts={"as_sql": True, "literal_binds": True, "output_buffer": printed},
        dialect_opts={"paramstyle": "named"},
    )
    with Operations.context(context) as op:
        for each in reversed(components) if downgrade else components:
            printed.write(f"-- {each.name}\nBEGIN;\n\n")
            if downgrade:
                start = each.latest if from_ is None else from_
                each.downgrade(op, to=to or 0, from_=start, schema=schema)
            else:
                each.upgrade(op, to=to, from_=from_ or 0, schema=schema)
            printed.write("COMMIT;\n\n")
    return printed.getvalue()


def _statuses(engine: Engine, components: Sequence[Component], schema: str) -> list[Status]:
    with engine.connect() as connection:
        return [each.status(connection, schema) for each in components]


def _ask(
    engine: Engine, components: Sequence[Component], schema: str, to: int, *, yes: bool
) -> None:
    where = f"schema {schema!r} of database {engine.url.database!r}"
    if to > 0:
        names = ", ".join(each.name for each in components)
        confirm(f"Take {names} in {where} back to version {to}?", yes=yes)
        return
    filled = _tables_with_rows(engine, components, schema)
    what = f"with the rows in {', '.join(filled)}" if filled else "all of them empty"
    confirm(f"Drop the tables in {where}, {what}?", yes=yes)


def _tables_with_rows(engine: Engine, components: Sequence[Component], schema: str) -> list[str]:
    from sqlalchemy import inspect, text

    with engine.connect() as connection:
        there = set(inspect(connection).get_table_names(schema=schema))
        made = sorted(
            there.intersection(*[frozenset().union(*(c.table_names for c in components))])
        )
        return [
            table
            for table in made
            if connection.scalar(
                text(in_schema(f"SELECT EXISTS (SELECT FROM {{schema}}.{table})", schema))  # noqa: S608
            )
        ]


def _report(before: Sequence[Status], after: Sequence[Status], *, as_json: bool) -> None:
    pairs = list(zip(before, after, strict=True))
    if as_json:
        print_json([_as_dict(old, new) for old, new in pairs])
        return
    print_table(
        ["component", "schema", "before", "now", "newest", "made by"],
        [
            [new.component, new.schema, old.version, new.version, new.latest, new.package_version]
            for old, new in pairs
        ],
        title="Tables",
    )


def _as_dict(old: Status, new: Status) -> dict[str, Any]:
    return {
        "component": new.component,
        "schema": new.schema,
        "before": old.version,
        "version": new.version,
        "latest": new.latest,
        "package_version": new.package_version,
        "applied_at": new.applied_at,
    }
