"""Version 2: rows of ordered keys that stay quickly found while their dead versions pile up (outbox/busy_keys.py).

Keys that have had many events move there by themselves, with their next one.
"""

from __future__ import annotations

from typing import Final

UP: Final = (
    # Null: counted in outbox_busy_key. A publisher of an older release fails on it, and counts nothing twice.
    "ALTER TABLE {schema}.outbox_key ALTER COLUMN seq DROP NOT NULL",
    """
    CREATE TABLE {schema}.outbox_busy_key (
        source      text        NOT NULL,
        type        text        NOT NULL,
        key         text        NOT NULL,
        span        bigint      NOT NULL,
        seq         bigint      NOT NULL,
        PRIMARY KEY (source, type, key, span)
    ) WITH (fillfactor = 50)
    """,
    # A function for its setting: of a small table the planner would read all pages, would still do so for a
    # while when it has grown, and under SERIALIZABLE would set writers of different keys against each other.
    """
    CREATE FUNCTION {schema}.count_busy_key(of_source text, of_type text, of_key text, events bigint)
    RETURNS bigint LANGUAGE plpgsql SET enable_seqscan = off AS $$
    DECLARE
        counted bigint;
    BEGIN
        UPDATE {schema}.outbox_busy_key AS k SET seq = k.seq + events, span = (k.seq + events) / 100
        WHERE k.source = of_source AND k.type = of_type AND k.key = of_key AND k.span >= (
            SELECT newest.span FROM {schema}.outbox_busy_key AS newest
            WHERE newest.source = of_source AND newest.type = of_type AND newest.key = of_key
            ORDER BY newest.span DESC LIMIT 1
        ) RETURNING k.seq INTO counted;
        RETURN counted;
    END
    $$
    """,
    # An inbox_order whose next_seq is 0 has moved here. A worker of an older release puts by what comes of it.
    """
    CREATE TABLE {schema}.inbox_busy_order (
        handler  text        NOT NULL,
        source   text        NOT NULL,
        type     text        NOT NULL,
        key      text        NOT NULL,
        span     bigint      NOT NULL,
        next_seq bigint      NOT NULL,
        passed   bigint[]    NOT NULL DEFAULT '{}',
        seen_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (handler, source, type, key, span)
    ) WITH (fillfactor = 50)
    """,
    # Who may use the first rows may use these, and the function, from the first busy key on: also their owner, should
    # another role migrate, and where new functions are not for everybody.
    """
    DO $$
    DECLARE
        right_given record;
    BEGIN
        FOR right_given IN
            SELECT privilege_type AS what,
                CASE relname WHEN 'outbox_key' THEN 'outbox_busy_key' ELSE 'inbox_busy_order' END AS busy,
                CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END AS who
            FROM pg_class CROSS JOIN aclexplode(COALESCE(relacl, acldefault('r', relowner)))
            WHERE pg_class.oid IN ('{schema}.outbox_key'::regclass, '{schema}.inbox_order'::regclass)
        LOOP
            EXECUTE 'GRANT ' || right_given.what || ' ON {schema}.' || right_given.busy
                || ' TO ' || right_given.who;
            IF right_given.busy = 'outbox_busy_key' AND right_given.what = 'UPDATE' THEN
                EXECUTE 'GRANT EXECUTE ON FUNCTION {schema}.count_busy_key(text, text, text, bigint) TO '
                    || right_given.who;
            END IF;
        END LOOP;
    END
    $$
    """,
)

DOWN: Final = (
    "LOCK TABLE {schema}.outbox_key, {schema}.outbox_busy_key, {schema}.inbox_order, "
    "{schema}.inbox_busy_order IN ACCESS EXCLUSIVE MODE",
    """
    UPDATE {schema}.outbox_key AS k SET seq = b.seq FROM {schema}.outbox_busy_key AS b
    WHERE b.source = k.source AND b.type = k.type AND b.key = k.key
    """,
    """
    UPDATE {schema}.inbox_order AS o SET next_seq = b.next_seq, passed = b.passed
    FROM {schema}.inbox_busy_order AS b
    WHERE b.handler = o.handler AND b.source = o.source AND b.type = o.type AND b.key = o.key
    """,
    "ALTER TABLE {schema}.outbox_key ALTER COLUMN seq SET NOT NULL",
    "DROP FUNCTION {schema}.count_busy_key(text, text, text, bigint)",
    "DROP TABLE {schema}.outbox_busy_key, {schema}.inbox_busy_order",
)
