"""This repository's own Alembic environment: `alembic upgrade head` from the top of the tree.

Users do not need it: they call `outbox.schema.upgrade` from a revision of theirs, or run `outbox
migrate`. The database is named by `-x url=...` or OUTBOX_DATABASE_URL, the schema by
`-x schema=...` or OUTBOX_SCHEMA; the version table lies in that schema. `alembic check` compares
the tables with the models of both packages.
"""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection, create_engine, make_url, pool, text

import outbox.tables
import saga.tables
from outbox.columns import PgSnapshot, Xid8
from outbox.sql import DEFAULT_SCHEMA, in_schema

arguments = context.get_x_argument(as_dictionary=True)
url = arguments.get("url") or os.environ.get("OUTBOX_DATABASE_URL")
schema = arguments.get("schema") or os.environ.get("OUTBOX_SCHEMA") or DEFAULT_SCHEMA
if not url:
    raise SystemExit("name the database: alembic -x url=postgresql+psycopg://... upgrade head")

database = make_url(url)
if database.drivername in {"postgresql", "postgres"}:
    database = database.set(drivername="postgresql+psycopg")
context.config.attributes["schema"] = schema
version_table = {"version_table": "alembic_version", "version_table_schema": schema}
create_schema = text(in_schema("CREATE SCHEMA IF NOT EXISTS {schema}", schema))

PARTITIONS = text(
    "SELECT relname FROM pg_class WHERE relispartition AND relnamespace = to_regnamespace(:schema)"
)


def run_offline() -> None:
    """Print the SQL: `alembic upgrade head --sql`."""
    context.configure(
        url=database,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        **version_table,
    )
    with context.begin_transaction():
        context.execute(create_schema)
        context.run_migrations()


def run_online(connection: Connection) -> None:
    """Change the database, and compare it with the models of both packages."""
    with connection.begin():
        connection.execute(create_schema)
        partitions = set(connection.scalars(PARTITIONS, {"schema": schema}))
    dialect = connection.dialect
    dialect.ischema_names = dialect.ischema_names | {"xid8": Xid8, "pg_snapshot": PgSnapshot}

    def is_ours(name: str | None, kind: str, _parents: object) -> bool:
        return name == schema if kind == "schema" else name not in partitions

    context.configure(
        connection=connection,
        target_metadata=saga.tables.make_tables(schema, outbox.tables.make_tables(schema)),
        include_schemas=True,
        include_name=is_ours,
        compare_type=True,
        autogenerate_plugins=[
            "alembic.autogenerate.*",
            "alembic.ext.checkconstraint_byname",
            "~alembic.autogenerate.outbox",
        ],
        **version_table,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    with create_engine(database, poolclass=pool.NullPool).connect() as connection:
        run_online(connection)
