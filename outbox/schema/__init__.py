"""The tables of `outbox`, as versioned functions that run in your Alembic revision or alone.

    from alembic import op
    from outbox import schema

    def upgrade() -> None:
        schema.upgrade(op, to=2, from_=0)

    def downgrade() -> None:
        schema.downgrade(op, to=0, from_=2)

`outbox migrate` does the same without Alembic. Relays and workers call `check` when they start.
"""

from __future__ import annotations

from typing import Final

from outbox.schema import v001, v002
from outbox.schema.component import Component, Op, Status

component: Final = Component("outbox", (v001, v002), oldest_usable=2)

upgrade = component.upgrade
downgrade = component.downgrade
upgrade_engine = component.upgrade_engine
downgrade_engine = component.downgrade_engine
status = component.status
check = component.check

__all__ = [
    "Component",
    "Op",
    "Status",
    "check",
    "component",
    "downgrade",
    "downgrade_engine",
    "status",
    "upgrade",
    "upgrade_engine",
]
