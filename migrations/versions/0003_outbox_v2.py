"""The tables of `outbox`, version 2."""

from __future__ import annotations

from alembic import context, op

from outbox import schema

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema.upgrade(op, to=2, from_=1, schema=context.config.attributes["schema"])


def downgrade() -> None:
    schema.downgrade(op, to=1, from_=2, schema=context.config.attributes["schema"])
