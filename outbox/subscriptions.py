"""Which handler takes which events, and since when: noted in the service's database when a worker starts.

What was published before a subscription began is nothing that it misses, and whoever compares databases
(`outbox audit`) must know what each should have. The workers of a service also note where they listen, so that
subscribers of its log know where to ask for what they miss.
"""

from __future__ import annotations

import logging
from typing import Final

from sqlalchemy.orm import Session

from outbox.service import Service
from outbox.statements import statement

log = logging.getLogger(__name__)

FIRST_ID_OF: Final = (
    "(lpad(to_hex((extract(epoch FROM {at}) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid"
)
"""SQL: the least UUIDv7 of a time."""

# A handler that was away for long begins anew. For short, it was a deploy, with workers of both releases about.
_NOTE = f"""
INSERT INTO {{schema}}.subscription AS known (handler, type, service, queue, first_id, hears_itself)
SELECT w.handler, w.type, :service, :queue, {FIRST_ID_OF.format(at="clock_timestamp()")}, w.hears_itself
FROM unnest(CAST(:handlers AS text[]), CAST(:types AS text[]), CAST(:hear AS boolean[]))
    AS w (handler, type, hears_itself)
ON CONFLICT (handler, type) DO UPDATE SET
    service = EXCLUDED.service, queue = EXCLUDED.queue, hears_itself = EXCLUDED.hears_itself, ended_at = NULL,
    since = CASE WHEN known.ended_at < clock_timestamp() - interval '1 day' THEN EXCLUDED.since ELSE known.since END,
    first_id = CASE WHEN known.ended_at < clock_timestamp() - interval '1 day' THEN EXCLUDED.first_id
        ELSE known.first_id END
WHERE known.ended_at IS NOT NULL OR known.queue <> EXCLUDED.queue OR known.service <> EXCLUDED.service
    OR known.hears_itself <> EXCLUDED.hears_itself
"""  # noqa: S608 - a constant
_END = """
UPDATE {schema}.subscription SET ended_at = clock_timestamp()
WHERE service = :service AND ended_at IS NULL AND (handler, type) NOT IN (
    SELECT * FROM unnest(CAST(:handlers AS text[]), CAST(:types AS text[]))
)
"""
# Workers note themselves every ten minutes (outbox/vigil.py).
_OTHERS = """
SELECT DISTINCT s.handler, s.service FROM {schema}.subscription AS s JOIN {schema}.outbox_worker AS w USING (service)
WHERE s.handler = ANY(:handlers) AND s.service <> :service AND s.ended_at IS NULL
    AND w.noted_at > clock_timestamp() - interval '20 minutes'
ORDER BY s.handler
"""
_LISTENS = """
INSERT INTO {schema}.outbox_worker (service, queue) VALUES (:service, :queue)
ON CONFLICT (service) DO UPDATE SET queue = EXCLUDED.queue, noted_at = clock_timestamp()
"""


def note(session: Session, service: Service) -> None:
    """Note what *service* takes now, and where; what it no longer takes has ended."""
    taken = [
        (handler.name, type, handler.hears_itself)
        for handler in service.handlers
        if handler.subscribes
        for type in sorted(handler.event_types)
    ]
    values = {
        "service": service.name,
        "queue": service.queue,
        "handlers": [handler for handler, _, _ in taken],
        "types": [type for _, type, _ in taken],
        "hear": [hears for _, _, hears in taken],
    }
    for other in session.execute(statement(_OTHERS, service.schema), values):
        log.error(
            "handler %s is of service %s here and of service %s, whose tables are in the same schema: each event is "
            "given to one of them only, as the inbox knows handlers by their names; rename one of them",
            other.handler, service.name, other.service,
        )  # fmt: skip
    for sql in (_NOTE, _END, _LISTENS):
        session.execute(statement(sql, service.schema), values)
