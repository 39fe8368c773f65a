"""An engine that a forked process does not share with its parent."""

from __future__ import annotations

import os
import threading

from sqlalchemy import URL, Engine, create_engine, make_url

from outbox.pooler import mind_poolers


class ForkSafeEngine:
    """Gives the engine, made when first asked for in this process.

    After a fork the parent's connections are left alone: closing them here would end them there.
    """

    def __init__(self, source: str | URL | Engine, *, name: str) -> None:
        """*source*: a database URL, or an engine of the caller's. *name*: its `application_name`."""
        self._given = source if isinstance(source, Engine) else None
        self._url = None if isinstance(source, Engine) else with_psycopg(source)
        self._name = name
        self._engine: Engine | None = None
        self._pid: int | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Engine:
        if self._engine is None or self._pid != os.getpid():
            with self._lock:
                self._engine = self._of_this_process()
                self._pid = os.getpid()
        return self._engine

    def _of_this_process(self) -> Engine:
        if self._pid is not None and self._pid != os.getpid() and self._engine is not None:
            self._engine.dispose(close=False)
        if self._given is not None:
            if self._pid is None:
                # Its pool may hold connections from before a fork: nobody says when it was made.
                self._given.dispose(close=False)
            return self._given
        assert self._url is not None
        engine = create_engine(
            self._url,
            # One per thread that asks; the worker's concurrency bounds them.
            pool_size=1_000,
            max_overflow=0,
            connect_args={
                "application_name": self._name[:63],
                "connect_timeout": 10,
                # A server that is gone without a word is noticed within half a minute.
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 4,
                "tcp_user_timeout": 30_000,
            },
        )
        return mind_poolers(engine)


def with_psycopg(source: str | URL) -> URL:
    """*source* with psycopg as its driver, where it names none."""
    url = make_url(source)
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    return url
