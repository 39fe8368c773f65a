"""The tables of `outbox` as SQLAlchemy Core, for queries by people and for the test that compares.

The DDL in `outbox/schema/` is what makes the tables; a test holds these models to it. The hot paths
speak SQL of their own. The partitions of a table are not listed: they come and go.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import UserDefinedType

from outbox.sql import DEFAULT_SCHEMA, checked_identifier


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
    _receiving(metadata, schema)
    _missing(metadata, schema)
    _waiting_for_a_person(metadata, schema)
    return metadata


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


def _missing(metadata: MetaData, schema: str) -> None:
    own_table(
        "subscription",
        metadata,
        Column("handler", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("service", Text, nullable=False),
        Column("queue", Text, nullable=False),
        moment("since"),
        Column("first_id", Uuid, nullable=False),
        Column("hears_itself", Boolean, nullable=False),
        moment("ended_at", default=False, nullable=True),
        PrimaryKeyConstraint("handler", "type"),
        schema=schema,
    )
    own_table(
        "roll_seen",
        metadata,
        Column("service", Text, nullable=False),
        Column("log", Uuid, nullable=False),
        Column("type", Text, nullable=False),
        Column("lane", SmallInteger, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("ask", Text),
        moment("seen_at"),
        PrimaryKeyConstraint("service", "log", "type", "lane"),
        schema=schema,
    )
    own_table(
        "awaited",
        metadata,
        Column("handler", Text, nullable=False),
        Column("event_id", Uuid, nullable=False),
        Column("service", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("log", Uuid, nullable=False),
        Column("lane", SmallInteger, nullable=False),
        Column("position", BigInteger, nullable=False),
        moment("noticed_at"),
        moment("next_ask_at", default=False),
        Column("asks", Integer, nullable=False, server_default=text("0")),
        moment("gone_at", default=False, nullable=True),
        PrimaryKeyConstraint("handler", "event_id"),
        Index("awaited_due", "service", "next_ask_at"),
        schema=schema,
    )
    own_table(
        "missed_roll",
        metadata,
        Column("service", Text, nullable=False),
        Column("log", Uuid, nullable=False),
        Column("type", Text, nullable=False),
        Column("lane", SmallInteger, nullable=False),
        Column("to_seq", BigInteger, nullable=False),
        Column("from_seq", BigInteger, nullable=False),
        Column("position", BigInteger, nullable=False, server_default=text("0")),
        moment("noticed_at"),
        moment("next_ask_at", default=False),
        Column("asks", Integer, nullable=False, server_default=text("0")),
        PrimaryKeyConstraint("service", "log", "type", "lane", "to_seq"),
        schema=schema,
    )


def _receiving(metadata: MetaData, schema: str) -> None:
    own_table(
        "inbox",
        metadata,
        Column("event_id", Uuid, nullable=False),
        Column("handler", Text, nullable=False),
        Column("digest", LargeBinary, nullable=False),
        moment("received_at"),
        PrimaryKeyConstraint("event_id", "handler"),
        schema=schema,
        postgresql_partition_by="RANGE (event_id)",
    )
    own_table(
        "pending_delivery",
        metadata,
        Column("service", Text, nullable=False),
        Column("handler", Text, nullable=False),
        Column("event_id", Uuid, nullable=False),
        Column("reason", Text, nullable=False),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("sends", Integer, nullable=False, server_default=text("0")),
        moment("next_attempt_at", default=False),
        Column("type", Text, nullable=False),
        Column("key", Text),
        Column("key_seq", BigInteger),
        Column("body", LargeBinary, nullable=False),
        Column("error", Text),
        moment("created_at"),
        PrimaryKeyConstraint("handler", "event_id"),
        CheckConstraint(
            "reason IN ('retry', 'crash', 'redrive', 'timer', 'early')",
            name="pending_delivery_reason_check",
        ),
        Index("pending_delivery_due", "service", "next_attempt_at"),
        Index(
            "pending_delivery_early",
            "handler",
            "type",
            "key",
            "key_seq",
            postgresql_where=text("reason = 'early'"),
        ),
        schema=schema,
    )
    own_table(
        "inbox_order",
        metadata,
        Column("handler", Text, nullable=False),
        Column("source", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("next_seq", BigInteger),
        Column("passed", ARRAY(BigInteger), nullable=False, server_default=text("'{}'")),
        moment("seen_at"),
        PrimaryKeyConstraint("handler", "source", "type", "key"),
        schema=schema,
    )
    own_table(
        "inbox_busy_order",
        metadata,
        Column("handler", Text, nullable=False),
        Column("source", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("span", BigInteger, nullable=False),
        Column("next_seq", BigInteger, nullable=False),
        Column("passed", ARRAY(BigInteger), nullable=False, server_default=text("'{}'")),
        moment("seen_at"),
        PrimaryKeyConstraint("handler", "source", "type", "key", "span"),
        schema=schema,
        postgresql_with={"fillfactor": 50},
    )


def _waiting_for_a_person(metadata: MetaData, schema: str) -> None:
    own_table(
        "dead_letter",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("service", Text, nullable=False),
        Column("handler", Text, nullable=False),
        Column("event_id", Uuid, nullable=False),
        Column("type", Text, nullable=False),
        Column("key", Text),
        Column("key_seq", BigInteger),
        Column("body", LargeBinary, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("error", Text, nullable=False),
        Column("traceback", Text, nullable=False),
        moment("parked_at"),
        UniqueConstraint("handler", "event_id"),
        schema=schema,
    )
    own_table(
        "quarantine",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("service", Text, nullable=False),
        Column("digest", LargeBinary, nullable=False),
        Column("event_id", Uuid),
        Column("reason", Text, nullable=False),
        Column("headers", Text, nullable=False),
        Column("key_seq", BigInteger),
        Column("body", LargeBinary, nullable=False),
        Column("times_seen", Integer, nullable=False, server_default=text("1")),
        moment("first_seen"),
        moment("last_seen"),
        UniqueConstraint("service", "digest"),
        Index("quarantine_event", "event_id", postgresql_where=text("event_id IS NOT NULL")),
        schema=schema,
    )
