"""The tables that a service needs to receive, as `outbox.tables` has them."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
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
    UniqueConstraint,
    Uuid,
    text,
)

from outbox.columns import moment, own_table


def missing(metadata: MetaData, schema: str) -> None:
    """What a service subscribes to, has been told of and misses."""
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


def receiving(metadata: MetaData, schema: str) -> None:
    """The inbox, and where handlers stand."""
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


def waiting_for_a_person(metadata: MetaData, schema: str) -> None:
    """What was given up or could not be read."""
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
