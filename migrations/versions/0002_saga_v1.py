"""The tables of `saga`, version 1."""

from __future__ import annotations

from alembic import context, op

from saga import schema

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema.upgrade(op, to=1, from_=0, schema=context.config.attributes["schema"])


def downgrade() -> None:
    schema.downgrade(op, to=0, from_=1, schema=context.config.attributes["schema"])
