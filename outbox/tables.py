"""The tables of `outbox` as SQLAlchemy Core, for queries by people and for the test that compares.

The DDL in `outbox/schema/` is what makes the tables; a test holds these models to it. The hot paths
speak SQL of their own. The partitions of a table are not listed: they come and go.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from outbox.columns import PgSnapshot, Xid8, moment, own_table
from outbox.receiving_tables import missing, receiving, waiting_for_a_person
from outbox.sql import DEFAULT_SCHEMA, checked_identifier


def make_tables(schema: str = DEFAULT_SCHEMA, metadata: MetaData | None = None) -> MetaData:
    """All tables of `outbox` in *schema*, added to *metadata* or to a new one.

    They may stand in the metadata that your autogenerate compares: the Alembic plug-in knows them.
    """
    checked_identifier(schema)
    metadata = MetaData() if metadata is None else metadata
    _bookkeeping(metadata, schema)
    _log(metadata, schema)
    _cursors_and_leases(metadata, schema)
    _rolls(metadata, schema)
    receiving(metadata, schema)
    missing(metadata, schema)
    waiting_for_a_person(metadata, schema)
    return metadata


def _bookkeeping(metadata: MetaData, schema: str) -> None:
    own_table(
        "schema_version",
        metadata,
        Column("component", Text, nullable=False),
        Column("version", Integer, nullable=False),
        Column("package_version", Text, nullable=False),
        moment("applied_at"),
        PrimaryKeyConstraint("component", "version"),
        schema=schema,
    )


def _log(metadata: MetaData, schema: str) -> None:
    own_table(
        "outbox_event",
        metadata,
        Column("xid", Xid8, nullable=False, server_default=text("pg_current_xact_id()")),
        Column(
            "position",
            BigInteger,
            nullable=False,
            server_default=text(f"nextval('{schema}.outbox_event_position'::regclass)"),
        ),
        Column("lane", SmallInteger, nullable=False),
        Column("event_id", Uuid, nullable=False),
        Column("type", Text, nullable=False),
        Column("version", Integer, nullable=False),
        Column("key", Text),
        Column("key_seq", BigInteger),
        moment("occurred_at"),
        Column("body", LargeBinary, nullable=False),
        PrimaryKeyConstraint("lane", "position"),
        CheckConstraint("lane BETWEEN 0 AND 15", name="outbox_event_lane_check"),
        Index("outbox_event_xid", "xid", "position"),
        schema=schema,
        postgresql_partition_by="RANGE (position)",
    )
    own_table(
        "outbox_key",
        metadata,
        Column("source", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("seq", BigInteger),
        PrimaryKeyConstraint("source", "type", "key"),
        schema=schema,
        postgresql_with={"fillfactor": 50},
    )
    own_table(
        "outbox_busy_key",
        metadata,
        Column("source", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("span", BigInteger, nullable=False),
        Column("seq", BigInteger, nullable=False),
        PrimaryKeyConstraint("source", "type", "key", "span"),
        schema=schema,
        postgresql_with={"fillfactor": 50},
    )


def _cursors_and_leases(metadata: MetaData, schema: str) -> None:
    own_table(
        "outbox_cursor",
        metadata,
        Column("slot", SmallInteger, nullable=False),
        Column("lane", SmallInteger, nullable=False),
        Column("epoch", BigInteger, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("hi", BigInteger, nullable=False),
        Column("snapshot", PgSnapshot, nullable=False),
        Column("ceil", Xid8, nullable=False, server_default=text("pg_current_xact_id()")),
        moment("stored_at"),
        PrimaryKeyConstraint("slot", "lane", "epoch", "seq"),
        Index("outbox_cursor_newest", "lane", "epoch", "seq"),
        schema=schema,
        postgresql_partition_by="LIST (slot)",
    )
    own_table(
        "outbox_lease",
        metadata,
        Column("lane", SmallInteger, nullable=False),
        Column("epoch", BigInteger, nullable=False),
        Column("relay_id", Uuid),
        moment("taken_at"),
        PrimaryKeyConstraint("lane", "epoch"),
        schema=schema,
    )
    own_table(
        "outbox_heartbeat",
        metadata,
        Column("relay_id", Uuid, nullable=False),
        Column("seq", BigInteger, nullable=False),
        moment("expires_at", default=False),
        Column("host", Text, nullable=False),
        PrimaryKeyConstraint("relay_id", "seq"),
        Index("outbox_heartbeat_expires", "expires_at"),
        schema=schema,
    )
    own_table(
        "outbox_cluster",
        metadata,
        Column("system_identifier", BigInteger, primary_key=True, autoincrement=False),
        moment("adopted_at"),
        schema=schema,
    )


def _rolls(metadata: MetaData, schema: str) -> None:
    own_table(
        "outbox_log",
        metadata,
        Column("id", Uuid, primary_key=True, server_default=text("gen_random_uuid()")),
        moment("made_at"),
        schema=schema,
    )
    own_table(
        "outbox_roll",
        metadata,
        Column("lane", SmallInteger, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("hi", BigInteger, nullable=False),
        Column("snapshot", PgSnapshot, nullable=False),
        Column("types", JSONB, nullable=False),
        moment("called_at"),
        PrimaryKeyConstraint("lane", "seq"),
        schema=schema,
    )
    own_table(
        "outbox_worker",
        metadata,
        Column("service", Text, primary_key=True),
        Column("queue", Text, nullable=False),
        moment("noted_at"),
        schema=schema,
    )
    own_table(
        "replay_request",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("queue", Text, nullable=False),
        Column("wanted", Text, nullable=False),
        moment("asked_at"),
        schema=schema,
    )
