"""Keeps the tables of installed components out of a user's `alembic revision --autogenerate`.

Alembic loads this by entry point whenever Alembic itself is imported; the entry point's name lies
under `alembic.autogenerate.`, which the default of `autogenerate_plugins` includes, so that no
`env.py` needs an edit. Whoever sets that option to a list of their own, or has an Alembic older
than 1.18, writes an `include_name` that leaves out the schema.

Nothing heavy and nothing of Alembic's may be imported here: its own import is still going on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import MigrateOperation, UpgradeOps
    from alembic.runtime.plugins import Plugin
    from alembic.util import PriorityDispatchResult
    from sqlalchemy import Connection

_Names = set[tuple[str | None, str]]

# From the catalogues alone: whoever runs autogenerate may have no right to read the tables.
# A schema is ours by the shape of its `schema_version`, not by its name.
_OUR_TABLES: Final = """
    WITH home AS (
        SELECT c.relnamespace
        FROM pg_class AS c
        JOIN pg_attribute AS a ON a.attrelid = c.oid
        WHERE c.relname = 'schema_version' AND c.relkind = 'r'
          AND a.attname IN ('component', 'version', 'package_version', 'applied_at')
        GROUP BY c.oid, c.relnamespace
        HAVING count(*) = 4
    ), made AS (
        SELECT c.oid, c.relnamespace, c.relname
        FROM home JOIN pg_class AS c USING (relnamespace)
        WHERE c.relname = ANY (:names)
    )
    SELECT nspname, relname FROM made JOIN pg_namespace AS n ON n.oid = made.relnamespace
    UNION
    SELECT n.nspname, child.relname
    FROM made
    JOIN pg_inherits ON inhparent = made.oid
    JOIN pg_class AS child ON child.oid = inhrelid
    JOIN pg_namespace AS n ON n.oid = child.relnamespace
"""


def setup(plugin: Plugin) -> None:
    """Called by Alembic: have the last word on what autogenerate found in the schemas."""
    from alembic.util import DispatchPriority

    plugin.add_autogenerate_comparator(
        _recognise_our_types,
        "schema",
        "outbox",
        qualifier="postgresql",
        priority=DispatchPriority.FIRST,
    )
    plugin.add_autogenerate_comparator(
        _leave_our_tables_alone,
        "schema",
        "outbox",
        qualifier="postgresql",
        priority=DispatchPriority.LAST,
    )


def _recognise_our_types(
    context: AutogenContext, _found: UpgradeOps, _schemas: set[str | None]
) -> PriorityDispatchResult:
    """Spare the user SQLAlchemy's warnings about types that it does not know."""
    from alembic.util import PriorityDispatchResult

    from outbox.columns import PgSnapshot, Xid8

    assert context.connection is not None
    dialect: Any = context.connection.dialect
    dialect.ischema_names = {"xid8": Xid8, "pg_snapshot": PgSnapshot, **dialect.ischema_names}
    return PriorityDispatchResult.CONTINUE


def _leave_our_tables_alone(
    context: AutogenContext, found: UpgradeOps, _schemas: set[str | None]
) -> PriorityDispatchResult:
    from alembic.util import PriorityDispatchResult

    if found.ops:
        assert context.connection is not None
        ours = _in_the_database(context.connection) | _in_the_metadata(context)
        default = context.connection.dialect.default_schema_name
        found.ops[:] = [each for each in found.ops if _table_of(each, default) not in ours]
    return PriorityDispatchResult.CONTINUE


def _in_the_database(connection: Connection) -> _Names:
    from sqlalchemy import text

    from outbox.schema.installed import installed_components

    names = {"schema_version"}.union(*(each.table_names for each in installed_components()))
    rows = connection.execute(text(_OUR_TABLES), {"names": sorted(names)})
    return {(schema, table) for schema, table in rows}


def _in_the_metadata(context: AutogenContext) -> _Names:
    return {
        (table.schema, table.name)
        for table in context.sorted_tables
        if table.info.get("made_by") == "outbox.schema"
    }


def _table_of(operation: MigrateOperation, default_schema: str | None) -> tuple[str | None, str]:
    schema: str | None = getattr(operation, "schema", None)
    return schema or default_schema, getattr(operation, "table_name", "")
