"""Many relays: what two get done together, and how soon one follows a dead one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from queue import Queue
from threading import Thread
from typing import Any, Final

import psycopg
from sqlalchemy import URL

from bench.figures import Figure, Timer, allowed
from bench.processes import relay, running
from bench.publishing import conninfo, fill
from outbox.doorbell import channel

EVENTS: Final = 100_000
PATIENCE_SECONDS: Final = 60.0
HOLDERS: Final = """
SELECT count(DISTINCT relay_id), count(*) FROM (
    SELECT DISTINCT ON (lane) lane, relay_id FROM outbox.outbox_lease ORDER BY lane, epoch DESC
) AS newest WHERE relay_id IS NOT NULL
"""
LANES: Final = 16


def figures(database: URL, broker_url: str) -> Iterator[Figure]:
    yield Figure(
        f"drain {EVENTS:,} events with two relays, no broker", "events/s",
        _draining(database, 2), _draining(database, 1), "one relay", floor=1.5, reach=1.9,
    )  # fmt: skip
    yield Figure(
        "takeover after SIGKILL", "ms", _taking_over(database, broker_url), allowed(5.0), "allowed",
        ceiling=1, reach=0.6,
    )  # fmt: skip


def _draining(database: URL, count: int) -> Callable[[Timer], None]:
    def measured(timer: Timer) -> None:
        taken: Queue[int] = Queue()
        with (
            psycopg.connect(conninfo(database), autocommit=True) as connection,
            ExitStack() as stack,
        ):
            command = [sys.executable, "-m", "bench.null_relay", conninfo(database)]
            for _ in range(count):
                process = stack.enter_context(running(command, stdout=subprocess.PIPE))
                Thread(target=_count, args=(process, taken), daemon=True).start()
            await_holders(connection, count)
            while not taken.empty():
                taken.get()
            fill(connection, EVENTS)
            with timer.counting(EVENTS):
                connection.execute(f'NOTIFY "{channel("outbox")}"'.encode())  # they may be pausing
                left = EVENTS
                while left > 0:
                    left -= taken.get(timeout=PATIENCE_SECONDS)

    return measured


def _count(process: subprocess.Popen[bytes], taken: Queue[int]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        taken.put(int(line))


def _taking_over(database: URL, broker_url: str) -> Callable[[Timer], None]:
    def measured(timer: Timer) -> None:
        with (
            psycopg.connect(conninfo(database), autocommit=True) as connection,
            relay(database, broker_url) as first,
            relay(database, broker_url),
        ):
            await_holders(connection, 2)
            with timer.counting(1):
                first.kill()
                await_holders(connection, 1)

    return measured


def await_holders(connection: psycopg.Connection[Any], count: int) -> None:
    """Until so many relays hold all lanes between them, evenly."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while connection.execute(HOLDERS).fetchone() != (count, LANES):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the lanes are not held by {count} relays")
        time.sleep(0.01)
