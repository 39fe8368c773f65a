"""The tables of `saga`, as versioned functions: `outbox.schema` again, on a line of their own.

Both live in the same database schema, and a participant needs both.
"""

from __future__ import annotations

from typing import Final

from outbox.schema import Component
from saga.schema import v001

component: Final = Component("saga", (v001,))

upgrade = component.upgrade
downgrade = component.downgrade
upgrade_engine = component.upgrade_engine
downgrade_engine = component.downgrade_engine
status = component.status
check = component.check

__all__ = [
    "check",
    "component",
    "downgrade",
    "downgrade_engine",
    "status",
    "upgrade",
    "upgrade_engine",
]
