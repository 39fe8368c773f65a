"""What the models of tables are made of."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, DateTime, MetaData, Table, text
from sqlalchemy.types import UserDefinedType


class Xid8(UserDefinedType[str]):
    """PostgreSQL's 64-bit transaction id, as the text of a number."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """The type's name in DDL."""
        return "xid8"


class PgSnapshot(UserDefinedType[str]):
    """PostgreSQL's `pg_snapshot`, as `xmin:xmax:xip,...`."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """The type's name in DDL."""
        return "pg_snapshot"


def own_table(name: str, metadata: MetaData, *contents: Any, schema: str, **options: Any) -> Table:
    """A table marked as made by a component's steps and by nobody's autogenerate."""
    return Table(
        name, metadata, *contents, schema=schema, info={"made_by": "outbox.schema"}, **options
    )


def moment(name: str, *, default: bool = True, nullable: bool = False) -> Column[Any]:
    """A `timestamptz`, by *default* the time of the statement and not of the transaction."""
    return Column(
        name,
        DateTime(timezone=True),
        nullable=nullable,
        server_default=text("clock_timestamp()") if default else None,
    )
