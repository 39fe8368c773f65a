"""Workers that are to be killed, many one after the other: forks of a process that has imported what takes long.

It has imported nothing of `outbox`, which looks for crash points in the environment when it is imported.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "celery.apps.worker",
        "celery.bin.worker",
        "celery.concurrency.solo",
        "celery.worker.consumer",
        "celery.worker.strategy",
        "kombu.transport.redis",
        "psycopg",
        "pydantic",
        "sqlalchemy.dialects.postgresql.psycopg",
        "sqlalchemy.orm",
    ]
)


def exit_code(options: Sequence[str], environment: Mapping[str, str], log: Path) -> int | None:
    """Run a worker of `tests/apps/billing.py` to its end, for which it has 30 s."""
    process = _FORKS.Process(target=_work, args=(list(options), dict(environment), log))
    process.start()
    process.join(30)
    code = process.exitcode
    process.kill()
    return code


def _work(options: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    from tests.apps.billing import app

    app.worker_main(
        ["worker", "--without-gossip", "--without-mingle", "--without-heartbeat", *options]
    )
