"""What a relay costs that has nothing to do, in a database where nobody else has anything to do either."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from sqlalchemy import URL

from bench.figures import Figure, Timer, allowed
from bench.lanes import await_holders
from bench.processes import relay
from bench.publishing import conninfo

SETTLING_SECONDS: Final = 3.0
"""Beyond what a start costs, and what is left from before."""
IDLE_SECONDS: Final = 20.0
SPENT: Final = """
SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""
BACKENDS: Final = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


def figures(database: URL, broker_url: str) -> Iterator[Figure]:
    idling = _Idling(database, broker_url)
    yield Figure(
        "CPU of an idle relay, a minute",
        "ms",
        idling.spent("relay"),
        allowed(0.3),
        "allowed",
        ceiling=1,
        reach=0.33,
    )
    yield Figure(
        "CPU of PostgreSQL for an idle relay, a minute", "ms", idling.spent("postgresql"), allowed(0.3),
        "allowed to the relay",
    )  # fmt: skip
    yield Figure(
        "transactions for an idle relay", "a second", idling.transactions, allowed(1), "one"
    )


@dataclass
class _Idling:
    """Each idle while is measured once, and each figure is given it once."""

    database: URL
    broker_url: str
    _kept: dict[str, list[float]] = field(
        default_factory=lambda: {"relay": [], "postgresql": [], "transactions": []}
    )

    def spent(self, program: str) -> Callable[[Timer], None]:
        """CPU seconds of *program*, for each minute."""

        def measured(timer: Timer) -> None:
            timer.seconds += self._take(program)
            timer.work += IDLE_SECONDS / 60

        return measured

    def transactions(self, timer: Timer) -> None:
        timer.work += self._take("transactions")
        timer.seconds += IDLE_SECONDS

    def _take(self, what: str) -> float:
        if not self._kept[what]:
            for name, spent in self._idle().items():
                self._kept[name].append(spent)
        return self._kept[what].pop()

    def _idle(self) -> Counter[str]:
        with (
            psycopg.connect(conninfo(self.database), autocommit=True) as connection,
            relay(self.database, self.broker_url) as process,
        ):
            await_holders(connection, 1)
            time.sleep(SETTLING_SECONDS)
            before = _read(connection, process.pid)
            time.sleep(IDLE_SECONDS)
            after = _read(connection, process.pid)
        after.subtract(before)
        return after


def _read(connection: psycopg.Connection[Any], relay_pid: int) -> Counter[str]:
    """What was spent so far, by the relay and the backends that it has."""
    backends = [pid for (pid,) in connection.execute(BACKENDS)]
    row = connection.execute(SPENT).fetchone()
    assert row is not None
    return Counter({
        "relay": _cpu_seconds(relay_pid),
        "postgresql": sum(map(_cpu_seconds, backends)),
        "transactions": row[0],
    })  # fmt: skip


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
