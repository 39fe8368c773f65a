"""A relay that runs in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine

from outbox.buses.base import Bus
from outbox.relay import Relay, RelaySettings

SOON = timedelta(milliseconds=300)


@contextmanager
def running(engine: Engine, bus: Bus, **settings: Any) -> Iterator[Relay]:
    """From the log of *engine* to *bus*."""
    relay = Relay(engine.url, bus, settings=RelaySettings(**settings))
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield relay
    finally:
        relay.stop()
        thread.join(60)
        assert not thread.is_alive()


def relaying(engine: Engine, bus: Bus, **settings: Any) -> AbstractContextManager[Relay]:
    """The same, and what was sent is named soon, so that losses show soon."""
    return running(engine, bus, **{"rolls": SOON, "standings": (SOON, SOON * 5), **settings})
