"""What a worker that is asked to end must still hear from its pool.

When its consumer closes, Celery forgets each job that no process of the pool has accepted, also one that a process has
been given and accepts in this very moment. Nobody reads that process's answer any more, for which it waits 30 s before
it ends, and the worker with it: as long as Kubernetes gives a pod in all. So the worker listens a little longer.
"""

from __future__ import annotations

import time
from typing import Any, Final

_LONGEST: Final = 5.0


def await_acceptance(pool: Any) -> None:
    """Read what the processes of *pool* (Celery's) say until each has accepted what it was given, some seconds at most.

    Only processes that an event loop talks to (`prefork`) have this; for other pools it does nothing.
    """
    processes = getattr(pool, "_pool", None)
    read = getattr(getattr(processes, "_result_handler", None), "_flush_outqueue", None)
    if processes is None or read is None:
        return
    deadline = time.monotonic() + _LONGEST
    for job in list(processes._cache.values()):
        while (process := job._write_to) is not None and not job._accepted:
            if not process._is_alive() or time.monotonic() > deadline:
                break
            read(
                process.outqR_fd,
                lambda _: None,
                processes._fileno_to_outq,
                processes._result_handler.on_state_change,
            )
