"""The doorbell: a process that publishes wakes the relays, which may be pausing.

It rings when an event is published, and not after the commit, for two reasons. A NOTIFY leaves a commit record in the
log that nobody waits for; behind the writer's commit it would be all that is not yet on disk when the relay reads, and
the relay, which sends only what is durable, would have to wait for the disk once more. In front of it, the writer's own
commit takes it along. And the relay is awake by the time at which the event can be seen, from when on it looks often.

NOTIFY never runs in the writer's transaction, which it would keep from committing beside others: a thread sends it,
alone, over a connection of its own. Nothing rests on it. A ring that is lost, or whose transaction is rolled back,
costs a relay a look or an event its wait for the next one; a writer never waits, and sees none of its errors.

A process rings for the first event after a quiet moment, and for what follows at once only now and then: a relay that
has been rung for looks often by itself (`outbox.relay`). So however much is published, the writers pay next to nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url

from outbox.errors import ConfigurationError
from outbox.sql import checked_identifier

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

log = logging.getLogger(__name__)

_AWAKE: Final = 0.005
"""Seconds after an event in which the relay looks so often that the next one need not ring."""
_AT_LEAST_EVERY: Final = 0.1
"""Seconds after which it rings though events keep coming: another relay, with other lanes, may be pausing."""
_KEEP_CONNECTION: Final = 300.0
"""Seconds without a ring after which the connection is given back."""
_LONGEST_REST: Final = 30.0
"""Seconds between two attempts at a database that cannot be had."""
_NEVER: Final = (float("-inf"), float("-inf"))
RINGING: Final[list[Doorbell]] = []
"""Those that this process rings whenever it publishes."""


def channel(schema: str) -> str:
    """What relays of *schema* listen to. Of names so long that two share one, each also hears the other's."""
    return f"outbox_{checked_identifier(schema)}"[:63]


def wake_relays(database: Engine | AsyncEngine | URL | str) -> Doorbell:
    """Let this process, whenever it publishes, wake the relays of *database*, an engine or a URL.

    Without it events wait for a relay's next look, a second at most. It takes a thread and a connection from the first
    event on, in each process that publishes; a forked one makes its own. Nothing is opened before. An event rings at
    every database that its process was told of. Called again for a database, it returns what it returned. Raises
    `ConfigurationError` for what is neither.
    """
    database = getattr(database, "sync_engine", database)
    if not isinstance(database, Engine | URL | str):
        raise ConfigurationError(
            f"cannot ring through a {type(database).__qualname__}: hand over an Engine or a database URL"
        )
    with _registering:
        place = _place(database)
        if place not in _bells:
            _register({**_bells, place: Doorbell(database)})
        return _bells[place]


def bells() -> list[Doorbell]:
    """Those that this process rings whenever it publishes."""
    return list(RINGING)


def announce(schema: str) -> None:
    """Say that an event for *schema* is about to be committed. Neither waits nor raises."""
    for bell in tuple(RINGING):  # another thread, or `ring` itself, may be changing it
        bell.ring(schema)


class Doorbell:
    """Rings at one database. Threads share it; `ring` only sets a flag for the one that sends.

    What is wanted is noted before the flag is set, and taken after the flag was cleared: so a ring that comes while
    another is being sent is sent next.
    """

    def __init__(self, database: Engine | URL | str) -> None:
        self._database = database
        self._closed = False
        self._thread: threading.Thread | None = None
        self._begin()

    def ring(self, schema: str = "outbox") -> None:
        """Wake the relays of *schema*, unless they must be awake. Neither waits nor raises.

        Call it before the commit, where something else than `outbox.publish` writes the events.
        """
        now = time.monotonic()
        wanted_at, rung_at = self._last.get(schema, _NEVER)
        if now - wanted_at < _AWAKE and now - rung_at < _AT_LEAST_EVERY:
            self._last[schema] = now, rung_at
            return
        self._last[schema] = now, now
        self._wanted.add(schema)
        self._flag.set()
        if self._thread is None:
            self._start()

    def close(self) -> None:
        """Ring no more, and give the connection back."""
        with _registering:
            _register({place: bell for place, bell in _bells.items() if bell is not self})
        self._closed = True
        self._flag.set()

    def _begin(self) -> None:
        """As nothing had happened yet: at first, and in a process that was forked, whose parent has the thread."""
        self._flag = threading.Event()
        self._starting = threading.Lock()
        self._thread = None
        self._wanted: set[str] = set()
        self._last: dict[str, tuple[float, float]] = {}  # when it was last wanted, and rung

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._send_all, name="outbox doorbell", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                log.debug("relays are not woken: %s", error)
                return
            self._thread = thread

    def _send_all(self) -> None:
        connection: Any = None
        failures = 0
        while not self._closed:
            if not self._flag.wait(_KEEP_CONNECTION):
                _close(connection)
                connection = None
                continue
            self._flag.clear()
            try:
                connection = connection or _connect(self._database)
                self._send(connection)
                failures = 0
            except Exception as error:
                _close(connection)
                connection = None
                failures += 1
                if failures == 1:
                    self._flag.set()  # a connection that was cut while idle is made again at once
                    continue
                if failures == 2:
                    log.warning("relays are not woken, they look by themselves: %s", _told(error))
                time.sleep(min(0.1 * 2 ** min(failures, 10), _LONGEST_REST))
        _close(connection)

    def _send(self, connection: Any) -> None:
        while self._wanted:
            schema = self._wanted.pop()
            try:
                with connection.cursor() as cursor:
                    cursor.execute(f'NOTIFY "{channel(schema)}"')
            except BaseException:
                self._wanted.add(schema)
                raise


_bells: dict[object, Doorbell] = {}
_registering = threading.Lock()


def _register(bells: dict[object, Doorbell]) -> None:
    global _bells
    _bells = bells
    RINGING[:] = bells.values()


def _after_fork() -> None:
    global _registering
    _registering = threading.Lock()
    for bell in _bells.values():
        # What the parent's thread was using is left as it is: to close the connection here would end it there.
        bell._begin()


os.register_at_fork(after_in_child=_after_fork)


def _place(database: Engine | URL | str) -> object:
    url = _url(database)
    if url.host is None and url.database is None and not url.query:
        return id(database)  # what connects is not in the URL
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def _url(database: Engine | URL | str) -> URL:
    return database.url if isinstance(database, Engine) else make_url(database)


def _connect(database: Engine | URL | str) -> Any:
    """A connection of its own in autocommit, made as the engine makes its own, and in none of its places."""
    if not isinstance(database, Engine) or database.dialect.is_async:
        url = _url(database).set(drivername="postgresql+psycopg")
        limits = {"connect_timeout": 10, "tcp_user_timeout": 30_000, "keepalives_idle": 30}
        database = create_engine(
            url,
            poolclass=NullPool,
            connect_args={"application_name": "outbox doorbell", **limits},
        )
    pooled = database.pool.recreate().connect()
    pooled.detach()
    connection: Any = pooled.dbapi_connection
    connection.autocommit = True
    if hasattr(connection, "prepare_threshold"):
        connection.prepare_threshold = None  # there may be a pooler
    return connection


def _close(connection: Any) -> None:
    if connection is not None:
        try:
            connection.close()
        except Exception as error:
            log.debug("closing: %s", _told(error))


def _told(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
