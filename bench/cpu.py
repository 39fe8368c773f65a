"""What the processors did meanwhile, by program: on shared cores a rate also measures the broker.

All processes count, whoever started them, as servers are seldom children of whoever uses them: so measure on a machine
that does nothing else. The CPU time of a process that has ended in between is lost, but for PostgreSQL's backends.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Final

import psutil

_SERVER: Final = "postgresql"
_BY_ARGUMENT: Final = {
    "bench.null_relay": "relay",
    "relay": "relay",
    "worker": "worker",
    "multiprocessing.spawn": "writers",
    "test.mock.num.brokers": "kafka mock",
}
"""Python's processes, by the first of these that is one of their arguments or, where it has a dot, part of one."""
_BY_NAME: Final = {
    "postgres": _SERVER, "redis-server": "redis", "beam.smp": "rabbitmq", "java": "java", "tansu": "tansu",
}  # fmt: skip

Readings = Mapping[object, tuple[str, float]]


def read_cpu() -> Readings:
    """CPU seconds of every process that runs a program of interest, by process id; PostgreSQL's all together."""
    found: dict[object, tuple[str, float]] = {}
    server = 0.0
    for process in psutil.process_iter(("name", "cmdline", "cpu_times")):
        program, times = _program(process), process.info["cpu_times"]
        if program is None or times is None:
            continue
        seconds = times.user + times.system
        if program == _SERVER:
            # A backend that ends leaves its time to the postmaster.
            server += seconds + times.children_user + times.children_system
        else:
            found[process.pid] = program, seconds
    return found | {_SERVER: (_SERVER, server)}


def spent_since(before: Readings) -> Counter[str]:
    """CPU seconds by program since *before* was read."""
    spent: Counter[str] = Counter()
    for process, (program, seconds) in read_cpu().items():
        seconds -= before.get(process, (program, 0.0))[1]
        spent[program] += seconds  # type: ignore[assignment]  # a Counter's stubs know whole numbers only
    return +spent


def _program(process: psutil.Process) -> str | None:
    if process.pid == os.getpid():
        return "bench"  # some figures have their relay or their writers in here
    name: str = process.info["name"]
    if not name.startswith("python"):
        return next((known for start, known in _BY_NAME.items() if name.startswith(start)), None)
    arguments: list[str] = process.info["cmdline"] or []
    return next(
        (
            known
            for part, known in _BY_ARGUMENT.items()
            if part in arguments or ("." in part and any(part in one for one in arguments))
        ),
        None,
    )
