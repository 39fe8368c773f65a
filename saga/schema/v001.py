"""Version 1: each participant's own journal of the sagas that it has heard of."""

from __future__ import annotations

from typing import Final

UP: Final = (
    # One row per saga and participant: its lock settles every race between a step, a join, a
    # deadline and an abort. A row that an abort inserts before anything else happened here is the
    # tombstone. The participant is part of every key, so that two can share a schema.
    """
    CREATE TABLE {schema}.saga (
        saga_id     uuid        NOT NULL,
        participant text        NOT NULL,
        definition  text,
        decides     boolean     NOT NULL DEFAULT false,
        state       text        NOT NULL CHECK (state IN
                        ('running', 'completed', 'compensating', 'compensated')),
        stuck       boolean     NOT NULL DEFAULT false,
        reason      text,
        started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        changed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (saga_id, participant)
    )
    """,
    "CREATE INDEX saga_open ON {schema}.saga (state) WHERE state IN ('running', 'compensating')",
    """
    CREATE INDEX saga_ended ON {schema}.saga (participant, changed_at)
        WHERE state IN ('completed', 'compensated')
    """,
    "CREATE INDEX saga_stuck ON {schema}.saga (changed_at) WHERE stuck",
    # One row per run of a step. The primary key lets a step run once per triggering event, also
    # after the inbox has forgotten it; a start's trigger is its own event, a join's is the saga.
    """
    CREATE TABLE {schema}.saga_step (
        saga_id     uuid        NOT NULL,
        participant text        NOT NULL,
        step        text        NOT NULL,
        trigger_id  uuid        NOT NULL,
        state       text        NOT NULL CHECK (state IN
                        ('done', 'rejected', 'skipped', 'stuck',
                         'compensating', 'compensation_stuck', 'compensated',
                         'calling', 'unresolved', 'happened', 'not_happened')),
        trigger     bytea       NOT NULL,
        emitted     bytea,
        published   text,
        reason      text,
        ordinal     bigint      GENERATED ALWAYS AS IDENTITY,
        ran_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
        changed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (saga_id, participant, step, trigger_id),
        FOREIGN KEY (saga_id, participant) REFERENCES {schema}.saga ON DELETE CASCADE
    )
    """,
    # The first event of each type that a join waits for; a second one of that type changes nothing.
    """
    CREATE TABLE {schema}.saga_join_arrival (
        saga_id     uuid        NOT NULL,
        participant text        NOT NULL,
        "join"      text        NOT NULL,
        type        text        NOT NULL,
        event_id    uuid        NOT NULL,
        body        bytea       NOT NULL,
        arrived_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (saga_id, participant, "join", type),
        FOREIGN KEY (saga_id, participant) REFERENCES {schema}.saga ON DELETE CASCADE
    )
    """,
    # What people did by hand, and why.
    """
    CREATE TABLE {schema}.saga_intervention (
        id          bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        saga_id     uuid        NOT NULL,
        participant text        NOT NULL,
        verb        text        NOT NULL,
        step        text,
        trigger_id  uuid,
        operator    text        NOT NULL,
        reason      text        NOT NULL,
        event       text,
        at          timestamptz NOT NULL DEFAULT clock_timestamp(),
        FOREIGN KEY (saga_id, participant) REFERENCES {schema}.saga ON DELETE CASCADE
    )
    """,
    "CREATE INDEX saga_intervention_of_saga ON {schema}.saga_intervention (saga_id, participant)",
    # Which run opened which saga, and waits for its end.
    """
    CREATE TABLE {schema}.saga_child (
        child_id    uuid        NOT NULL,
        saga_id     uuid        NOT NULL,
        participant text        NOT NULL,
        step        text        NOT NULL,
        trigger_id  uuid        NOT NULL,
        PRIMARY KEY (child_id, participant),
        FOREIGN KEY (saga_id, participant) REFERENCES {schema}.saga ON DELETE CASCADE
    )
    """,
    # Whose steps answer which events, as each participant has said of itself.
    """
    CREATE TABLE {schema}.saga_peer (
        participant text        NOT NULL,
        peer        text        NOT NULL,
        takes       text[]      NOT NULL,
        since       uuid        NOT NULL,
        known_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (participant, peer)
    )
    """,
    # Of a saga being undone: the events that a peer has answered and not undone yet.
    """
    CREATE TABLE {schema}.saga_peer_undone (
        saga_id     uuid        NOT NULL,
        participant text        NOT NULL,
        peer        text        NOT NULL,
        pending     uuid[]      NOT NULL,
        PRIMARY KEY (saga_id, participant, peer),
        FOREIGN KEY (saga_id, participant) REFERENCES {schema}.saga ON DELETE CASCADE
    )
    """,
)

DOWN: Final = (
    "DROP TABLE {schema}.saga_child, {schema}.saga_intervention, {schema}.saga_peer, {schema}.saga_peer_undone, "
    "{schema}.saga_join_arrival, {schema}.saga_step, {schema}.saga",
)
