"""What the database's checks look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from outbox.sql import in_schema

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outbox.schema import Component


@dataclass(frozen=True)
class Patient:
    """A connection in autocommit, so that no check holds a snapshot, and where to look."""

    connection: Connection
    schema: str
    components: tuple[Component, ...]

    def one(self, sql: str, **values: Any) -> Any:
        """The first column of the first row."""
        return self.connection.scalar(text(in_schema(sql, self.schema)), values)

    def rows(self, sql: str, **values: Any) -> list[Any]:
        """All rows."""
        return list(self.connection.execute(text(in_schema(sql, self.schema)), values))

    def setting(self, name: str) -> str:
        """A setting as it stands for this role and database."""
        return str(self.one("SELECT current_setting(:name)", name=name))
