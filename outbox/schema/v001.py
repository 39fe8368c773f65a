"""Version 1: the log with cursors and leases, the inbox, and what waits for a retry or a person."""

from __future__ import annotations

from typing import Final

UP: Final = (
    # --- the log. `xid` stands before `position`: defaults are evaluated in this order, so a
    # transaction has its xid before its first position, on which the reader's completeness rests
    # (outbox/reader.py).
    "CREATE SEQUENCE {schema}.outbox_event_position AS bigint CACHE 1",
    """
    CREATE TABLE {schema}.outbox_event (
        xid         xid8        NOT NULL DEFAULT pg_current_xact_id(),
        position    bigint      NOT NULL DEFAULT nextval('{schema}.outbox_event_position'),
        lane        smallint    NOT NULL CHECK (lane BETWEEN 0 AND 15),
        event_id    uuid        NOT NULL,
        type        text        NOT NULL,
        version     integer     NOT NULL,
        key         text,
        key_seq     bigint,
        occurred_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        body        bytea       NOT NULL,
        PRIMARY KEY (lane, position)
    ) PARTITION BY RANGE (position)
    """,
    # None on `position` alone: the planner would prefer it and filter by lane.
    "CREATE INDEX outbox_event_xid ON {schema}.outbox_event (xid, position)",
    # Without a partition that takes any position, publishing would fail once maintenance falls
    # behind.
    "CREATE TABLE {schema}.outbox_event_default PARTITION OF {schema}.outbox_event DEFAULT",
    *(
        f"CREATE TABLE {{schema}}.outbox_event_p{start:012d} PARTITION OF {{schema}}.outbox_event "
        f"FOR VALUES FROM ({start}) TO ({start + 1_000_000})"
        for start in (0, 1_000_000)
    ),
    # --- cursors and leases: inserted, never updated, so that a held xmin horizon cannot make them
    # rot. The newest row of a lane is the last entry of the index. `slot` is the table in use; the
    # others get truncated.
    """
    CREATE TABLE {schema}.outbox_cursor (
        slot        smallint    NOT NULL,
        lane        smallint    NOT NULL,
        epoch       bigint      NOT NULL,
        seq         bigint      NOT NULL,
        hi          bigint      NOT NULL,
        snapshot    pg_snapshot NOT NULL,
        ceil        xid8        NOT NULL DEFAULT pg_current_xact_id(),
        stored_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (slot, lane, epoch, seq)
    ) PARTITION BY LIST (slot)
    """,
    *(
        f"CREATE TABLE {{schema}}.outbox_cursor_{slot} "
        f"PARTITION OF {{schema}}.outbox_cursor FOR VALUES IN ({slot})"
        for slot in range(3)
    ),
    "CREATE INDEX outbox_cursor_newest ON {schema}.outbox_cursor (lane, epoch, seq)",
    # relay_id NULL: given back. The primary key lets one of two claimants win an epoch.
    """
    CREATE TABLE {schema}.outbox_lease (
        lane        smallint    NOT NULL,
        epoch       bigint      NOT NULL,
        relay_id    uuid,
        taken_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (lane, epoch)
    )
    """,
    """
    CREATE TABLE {schema}.outbox_heartbeat (
        relay_id    uuid        NOT NULL,
        seq         bigint      NOT NULL,
        expires_at  timestamptz NOT NULL,
        host        text        NOT NULL,
        PRIMARY KEY (relay_id, seq)
    )
    """,
    "CREATE INDEX outbox_heartbeat_expires ON {schema}.outbox_heartbeat (expires_at)",
    # Snapshots and xids mean nothing in another cluster: the relay compares before it reads.
    """
    CREATE TABLE {schema}.outbox_cluster (
        system_identifier bigint      NOT NULL PRIMARY KEY,
        adopted_at        timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    # --- the rolls: which events of a lane were handed to the broker, named between two readings
    # (outbox/rolls.py). The log's id tells subscribers whose events these are.
    """
    CREATE TABLE {schema}.outbox_log (
        id          uuid        NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
        made_at     timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "INSERT INTO {schema}.outbox_log DEFAULT VALUES",
    """
    CREATE TABLE {schema}.outbox_roll (
        lane        smallint    NOT NULL,
        seq         bigint      NOT NULL,
        hi          bigint      NOT NULL,
        snapshot    pg_snapshot NOT NULL,
        types       jsonb       NOT NULL,
        called_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (lane, seq)
    )
    """,
    # Where the workers of a service with this log listen: subscribers send there what they miss.
    """
    CREATE TABLE {schema}.outbox_worker (
        service     text        NOT NULL PRIMARY KEY,
        queue       text        NOT NULL,
        noted_at    timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    # What a subscriber misses, until a relay has sent it.
    """
    CREATE TABLE {schema}.replay_request (
        id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        queue       text        NOT NULL,
        wanted      text        NOT NULL,
        asked_at    timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    # The counter of an ordered key: its row lock is what makes positions of a key follow its
    # commits.
    """
    CREATE TABLE {schema}.outbox_key (
        source      text        NOT NULL,
        type        text        NOT NULL,
        key         text        NOT NULL,
        seq         bigint      NOT NULL,
        PRIMARY KEY (source, type, key)
    ) WITH (fillfactor = 50)
    """,
    # --- the inbox. Event ids are UUIDv7, so a range of ids is a range of time and forgetting is
    # dropping a partition.
    """
    CREATE TABLE {schema}.inbox (
        event_id    uuid        NOT NULL,
        handler     text        NOT NULL,
        digest      bytea       NOT NULL,
        received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (event_id, handler)
    ) PARTITION BY RANGE (event_id)
    """,
    "CREATE TABLE {schema}.inbox_default PARTITION OF {schema}.inbox DEFAULT",
    # --- deliveries that one handler is owed at a time: retries, timers, redrives. Sent to the
    # service's own queue when due; the row leaves in the transaction that settles the delivery.
    # `sends` counts how often since its last attempt began: each time it waits twice as long.
    """
    CREATE TABLE {schema}.pending_delivery (
        service         text        NOT NULL,
        handler         text        NOT NULL,
        event_id        uuid        NOT NULL,
        reason          text        NOT NULL
                        CHECK (reason IN ('retry', 'crash', 'redrive', 'timer', 'early')),
        attempts        integer     NOT NULL DEFAULT 0,
        sends           integer     NOT NULL DEFAULT 0,
        next_attempt_at timestamptz NOT NULL,
        type            text        NOT NULL,
        key             text,
        key_seq         bigint,
        body            bytea       NOT NULL,
        error           text,
        created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (handler, event_id)
    )
    """,
    "CREATE INDEX pending_delivery_due ON {schema}.pending_delivery (service, next_attempt_at)",
    """
    CREATE INDEX pending_delivery_early ON {schema}.pending_delivery (handler, type, key, key_seq)
    WHERE reason = 'early'
    """,
    # Which number of an ordered key a handler takes next; null until that is known.
    """
    CREATE TABLE {schema}.inbox_order (
        handler  text        NOT NULL,
        source   text        NOT NULL,
        type     text        NOT NULL,
        key      text        NOT NULL,
        next_seq bigint,
        passed   bigint[]    NOT NULL DEFAULT '{}',
        seen_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (handler, source, type, key)
    )
    """,
    # --- what this database's services subscribe to, since when, and what they miss of it
    # (outbox/roll_call.py). `first_id` is the least event id of that time.
    """
    CREATE TABLE {schema}.subscription (
        handler     text        NOT NULL,
        type        text        NOT NULL,
        service     text        NOT NULL,
        queue       text        NOT NULL,
        since       timestamptz NOT NULL DEFAULT clock_timestamp(),
        first_id    uuid        NOT NULL,
        hears_itself boolean    NOT NULL,
        ended_at    timestamptz,
        PRIMARY KEY (handler, type)
    )
    """,
    # The last roll of a type that was taken.
    """
    CREATE TABLE {schema}.roll_seen (
        service     text        NOT NULL,
        log         uuid        NOT NULL,
        type        text        NOT NULL,
        lane        smallint    NOT NULL,
        seq         bigint      NOT NULL,
        ask         text,
        seen_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (service, log, type, lane)
    )
    """,
    # Events that a roll named and that are not here: normally for moments, then they are holes.
    """
    CREATE TABLE {schema}.awaited (
        handler     text        NOT NULL,
        event_id    uuid        NOT NULL,
        service     text        NOT NULL,
        type        text        NOT NULL,
        log         uuid        NOT NULL,
        lane        smallint    NOT NULL,
        position    bigint      NOT NULL,
        noticed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        next_ask_at timestamptz NOT NULL,
        asks        integer     NOT NULL DEFAULT 0,
        gone_at     timestamptz,
        PRIMARY KEY (handler, event_id)
    )
    """,
    "CREATE INDEX awaited_due ON {schema}.awaited (service, next_ask_at)",
    # Rolls that a later one named and that did not come.
    """
    CREATE TABLE {schema}.missed_roll (
        service     text        NOT NULL,
        log         uuid        NOT NULL,
        type        text        NOT NULL,
        lane        smallint    NOT NULL,
        to_seq      bigint      NOT NULL,
        from_seq    bigint      NOT NULL,
        position    bigint      NOT NULL DEFAULT 0,
        noticed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        next_ask_at timestamptz NOT NULL,
        asks        integer     NOT NULL DEFAULT 0,
        PRIMARY KEY (service, log, type, lane, to_seq)
    )
    """,
    # --- what waits for a person
    """
    CREATE TABLE {schema}.dead_letter (
        id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        service     text        NOT NULL,
        handler     text        NOT NULL,
        event_id    uuid        NOT NULL,
        type        text        NOT NULL,
        key         text,
        key_seq     bigint,
        body        bytea       NOT NULL,
        attempts    integer     NOT NULL,
        error       text        NOT NULL,
        traceback   text        NOT NULL,
        parked_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
        UNIQUE (handler, event_id)
    )
    """,
    """
    CREATE TABLE {schema}.quarantine (
        id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        service     text        NOT NULL,
        digest      bytea       NOT NULL,
        event_id    uuid,
        reason      text        NOT NULL,
        headers     text        NOT NULL,
        key_seq     bigint,
        body        bytea       NOT NULL,
        times_seen  integer     NOT NULL DEFAULT 1,
        first_seen  timestamptz NOT NULL DEFAULT clock_timestamp(),
        last_seen   timestamptz NOT NULL DEFAULT clock_timestamp(),
        UNIQUE (service, digest)
    )
    """,
    "CREATE INDEX quarantine_event ON {schema}.quarantine (event_id) WHERE event_id IS NOT NULL",
)

DOWN: Final = (
    "DROP TABLE {schema}.quarantine, {schema}.dead_letter, {schema}.pending_delivery, "
    "{schema}.inbox_order, {schema}.inbox, {schema}.outbox_key, {schema}.outbox_cluster, {schema}.outbox_heartbeat, "
    "{schema}.outbox_lease, {schema}.outbox_cursor, {schema}.outbox_event, {schema}.outbox_log, {schema}.outbox_roll, "
    "{schema}.outbox_worker, {schema}.replay_request, {schema}.subscription, {schema}.roll_seen, {schema}.awaited, "
    "{schema}.missed_roll",
    "DROP SEQUENCE {schema}.outbox_event_position",
)
