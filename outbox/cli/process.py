"""What the commands that run until they are told to stop have in common."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from outbox.cli.output import masked


def log_to_stderr(level: str) -> None:
    """Log from *level* on, without the passwords of URLs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def collect_garbage_seldom() -> None:
    """For a process that has thousands of events in its hands at any time, none of them in a cycle.

    With Python's own threshold of 700 objects they would be gone through once for each page or two.
    """
    gc.set_threshold(10_000)


def stop_on_signals(stop: Callable[[], None], stopping: threading.Event) -> None:
    """Let SIGTERM and SIGINT set *stopping* and call *stop*; a second one ends the process."""

    def heard(number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
