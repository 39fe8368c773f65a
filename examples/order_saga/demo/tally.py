"""Lets a worker write down each delivery that it finishes, so that repeated ones are counted and not guessed.

For the demo only: its workers import this module (`celery worker --include`), the services know nothing of it.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import psycopg
from celery import signals

TABLE = """
CREATE TABLE demo_delivery (
    event_id    uuid,
    redelivered boolean     NOT NULL,
    receipt     text        NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
_INSERT = "INSERT INTO demo_delivery (event_id, redelivered, receipt) VALUES (%s, %s, %s)"

_of_thread = threading.local()


@signals.task_postrun.connect
def note_delivery(task: Any, retval: Any, state: str, **_: Any) -> None:
    request = task.request
    redelivered = bool((request.delivery_info or {}).get("redelivered"))
    receipt = retval if isinstance(retval, str) else state
    _connection().execute(_INSERT, (request.root_id, redelivered, receipt))


def _connection() -> psycopg.Connection:
    connection: psycopg.Connection | None = getattr(_of_thread, "connection", None)
    if connection is None or connection.closed:
        connection = psycopg.connect(os.environ["OUTBOX_DATABASE_URL"], autocommit=True)
        _of_thread.connection = connection
    return connection
