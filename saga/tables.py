"""The tables of `saga` as SQLAlchemy Core: the journal that each participant keeps."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Text,
    Uuid,
    false,
    text,
)
from sqlalchemy.schema import SchemaItem

from outbox.columns import moment, own_table
from outbox.sql import DEFAULT_SCHEMA, checked_identifier


def make_tables(schema: str = DEFAULT_SCHEMA, metadata: MetaData | None = None) -> MetaData:
    """All tables of `saga` in *schema*, added to *metadata* or to a new one."""
    checked_identifier(schema)
    metadata = MetaData() if metadata is None else metadata
    own_table(
        "saga",
        metadata,
        Column("saga_id", Uuid, nullable=False),
        Column("participant", Text, nullable=False),
        Column("definition", Text),
        Column("decides", Boolean, nullable=False, server_default=false()),
        Column("state", Text, nullable=False),
        Column("stuck", Boolean, nullable=False, server_default=false()),
        Column("reason", Text),
        moment("started_at"),
        moment("changed_at"),
        PrimaryKeyConstraint("saga_id", "participant"),
        CheckConstraint(
            "state IN ('running', 'completed', 'compensating', 'compensated')",
            name="saga_state_check",
        ),
        Index(
            "saga_open",
            "state",
            postgresql_where=text("state IN ('running', 'compensating')"),
        ),
        Index(
            "saga_ended",
            "participant",
            "changed_at",
            postgresql_where=text("state IN ('completed', 'compensated')"),
        ),
        Index("saga_stuck", "changed_at", postgresql_where=text("stuck")),
        schema=schema,
    )
    own_table(
        "saga_step",
        metadata,
        *_of_a_saga(schema),
        Column("step", Text, nullable=False),
        Column("trigger_id", Uuid, nullable=False),
        Column("state", Text, nullable=False),
        Column("trigger", LargeBinary, nullable=False),
        Column("emitted", LargeBinary),
        Column("published", Text),
        Column("reason", Text),
        Column("ordinal", BigInteger, Identity(always=True)),
        moment("ran_at"),
        moment("changed_at"),
        PrimaryKeyConstraint("saga_id", "participant", "step", "trigger_id"),
        CheckConstraint(
            "state IN ('done', 'rejected', 'skipped', 'stuck', "
            "'compensating', 'compensation_stuck', 'compensated', "
            "'calling', 'unresolved', 'happened', 'not_happened')",
            name="saga_step_state_check",
        ),
        schema=schema,
    )
    own_table(
        "saga_join_arrival",
        metadata,
        *_of_a_saga(schema),
        Column("join", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("event_id", Uuid, nullable=False),
        Column("body", LargeBinary, nullable=False),
        moment("arrived_at"),
        PrimaryKeyConstraint("saga_id", "participant", "join", "type"),
        schema=schema,
    )
    own_table(
        "saga_intervention",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        *_of_a_saga(schema),
        Column("verb", Text, nullable=False),
        Column("step", Text),
        Column("trigger_id", Uuid),
        Column("operator", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("event", Text),
        moment("at"),
        Index("saga_intervention_of_saga", "saga_id", "participant"),
        schema=schema,
    )
    own_table(
        "saga_child",
        metadata,
        Column("child_id", Uuid, nullable=False),
        *_of_a_saga(schema),
        Column("step", Text, nullable=False),
        Column("trigger_id", Uuid, nullable=False),
        PrimaryKeyConstraint("child_id", "participant"),
        schema=schema,
    )
    own_table(
        "saga_peer",
        metadata,
        Column("participant", Text, nullable=False),
        Column("peer", Text, nullable=False),
        Column("takes", ARRAY(Text), nullable=False),
        Column("since", Uuid, nullable=False),
        moment("known_at"),
        PrimaryKeyConstraint("participant", "peer"),
        schema=schema,
    )
    own_table(
        "saga_peer_undone",
        metadata,
        *_of_a_saga(schema),
        Column("peer", Text, nullable=False),
        Column("pending", ARRAY(Uuid), nullable=False),
        PrimaryKeyConstraint("saga_id", "participant", "peer"),
        schema=schema,
    )
    return metadata


def _of_a_saga(schema: str) -> tuple[SchemaItem, ...]:
    return (
        Column("saga_id", Uuid, nullable=False),
        Column("participant", Text, nullable=False),
        ForeignKeyConstraint(
            ["saga_id", "participant"],
            [f"{schema}.saga.saga_id", f"{schema}.saga.participant"],
            ondelete="CASCADE",
        ),
    )
