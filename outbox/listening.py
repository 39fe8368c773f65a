"""The relay's side of the doorbell (`outbox.doorbell`): a thread that listens, and wakes the one that relays.

It has a connection of its own, as LISTEN needs a session of its own: behind a transaction pooler nothing would be
heard, so it is not tried there, and the relay looks by itself. The relaying thread never touches this connection, and
waits for nobody but a bell in its own process: whatever happens here, no event waits for longer than without it.
"""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg

from outbox.bell import Bell
from outbox.doorbell import channel
from outbox.errors import told
from outbox.pooler import is_pooled

log = logging.getLogger(__name__)

_LONGEST_REST: Final = 30.0

Connect = Callable[[], psycopg.Connection[Any]]
"""Opens a connection in autocommit."""


@contextmanager
def listening(connect: Connect, schema: str, bell: Bell) -> Iterator[None]:
    """Ring *bell* whenever relays of *schema* are rung for, as long as the context is open."""
    ended = Bell()
    thread = threading.Thread(
        target=_listen_until, args=(ended, connect, schema, bell), name="outbox ears", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.ring()
        thread.join(timeout=10)


def _listen_until(ended: Bell, connect: Connect, schema: str, bell: Bell) -> None:
    rest = 0.0
    while not ended.wait(rest):
        try:
            with connect() as connection:
                if is_pooled(connection):
                    log.info("a pooler is between: looking for events, as no bell can be heard")
                    return
                connection.execute(f'LISTEN "{channel(schema)}"'.encode())
                rest = 0.0
                bell.ring()  # what was rung for before this was not heard
                _pass_on(connection, bell, ended)
                return
        except psycopg.Error as error:
            (log.debug if rest else log.warning)("listening: %s", told(error))
        except Exception:
            log.exception("listening: unexpected; beginning again")
        rest = min(max(rest * 2, 0.1), _LONGEST_REST)


def _pass_on(connection: psycopg.Connection[Any], bell: Bell, ended: Bell) -> None:
    """Until *ended*. Raises when the connection is lost."""
    while True:
        readable, _, _ = select.select([connection.fileno(), ended.fileno()], [], [])
        if ended.fileno() in readable:
            return
        for _ in connection.notifies(timeout=0):
            bell.ring()
