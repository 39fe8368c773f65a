"""The processes that figures measure: workers and relays, as a team would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL


@contextmanager
def worker(app: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Celery worker of *app* (`module:name`), quiet."""
    quiet = ["--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    with running(
        [sys.executable, "-m", "celery", "-A", app, "worker", *quiet, *options]
    ) as process:
        yield process


@contextmanager
def relay(database: URL, broker_url: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A relay, by its command line."""
    command = [sys.executable, "-c", "from outbox.cli import main; main()", "relay", *options]
    urls = {
        "OUTBOX_DATABASE_URL": database.render_as_string(hide_password=False),
        "OUTBOX_BROKER_URL": broker_url,
    }
    with running(command, urls) as process:
        yield process


@contextmanager
def running(
    command: list[str],
    environment: dict[str, str] | None = None,
    *,
    stdout: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is asked to end, and killed where it does not."""
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})},
        stdout=stdout, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
