"""Making, removing and describing the tables of both packages."""

from __future__ import annotations

from sqlalchemy import Engine, text

import outbox.schema
import outbox.tables
import saga.schema
import saga.tables

COMPONENTS = (outbox.schema.component, saga.schema.component)

# Everything that makes a table what it is, by name and free of the schema's name. Partitions are
# left out: the models do not list them.
CATALOGUE = """
WITH ours AS (
    SELECT oid, relname, relkind, relpersistence, reloptions
    FROM pg_class
    WHERE relnamespace = to_regnamespace(:schema) AND NOT relispartition AND relkind IN ('r', 'p')
)
SELECT relname || ' ' || relkind::text || relpersistence::text || ' '
    || coalesce(reloptions::text, '') || ' ' || coalesce(pg_get_partkeydef(oid), '') FROM ours
UNION ALL
SELECT format('%s column %s: %s %s %s %s %s', relname,
    row_number() OVER (PARTITION BY attrelid ORDER BY attnum), attname,
    format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'NOT NULL' END,
    attidentity, pg_get_expr(adbin, adrelid))
FROM ours JOIN pg_attribute ON attrelid = ours.oid AND attnum > 0 AND NOT attisdropped
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
UNION ALL
SELECT format('%s %s', relname, pg_get_indexdef(indexrelid)) FROM ours JOIN pg_index ON indrelid = oid
UNION ALL
SELECT format('%s %s %s', relname, conname, pg_get_constraintdef(c.oid))
FROM ours JOIN pg_constraint AS c ON conrelid = ours.oid
ORDER BY 1
"""


class Steps:
    """A version as a `vNNN.py` module has it."""

    def __init__(self, *up: str) -> None:
        self.UP = up
        self.DOWN = ("SELECT 1",)


def catalogue(engine: Engine, schema: str) -> list[str]:
    with engine.connect() as connection:
        lines = connection.scalars(text(CATALOGUE), {"schema": schema})
        return [line.replace(f"{schema}.", "") for line in lines]


def migrate(engine: Engine, schema: str = "outbox") -> None:
    for component in COMPONENTS:
        component.upgrade_engine(engine, schema=schema)


def remove(engine: Engine, schema: str = "outbox") -> None:
    for component in reversed(COMPONENTS):
        component.downgrade_engine(engine, schema=schema)


def make_models(engine: Engine, schema: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
        connection.execute(text(f"CREATE SEQUENCE {schema}.outbox_event_position"))
        saga.tables.make_tables(schema, outbox.tables.make_tables(schema)).create_all(connection)
