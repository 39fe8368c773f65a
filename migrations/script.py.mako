"""${message}."""

from __future__ import annotations

from alembic import context, op

from outbox import schema

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "schema.upgrade(op, to=..., from_=..., schema=context.config.attributes[\"schema\"])"}


def downgrade() -> None:
    ${downgrades if downgrades else "schema.downgrade(op, to=..., from_=..., schema=context.config.attributes[\"schema\"])"}
