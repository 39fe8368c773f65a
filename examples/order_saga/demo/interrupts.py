"""Ctrl-C and SIGTERM, taken note of and acted upon at the next pause.

An exception out of a signal handler could fall between the start of a process and the note that it was started, and
leave it behind. So nothing is interrupted but `pause`; only a second signal breaks in at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Somebody wants the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_received: list[int] = []


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Let `pause` raise `Interrupted` after a signal, inside of the block."""
    _received.clear()
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignoring_signals() -> Iterator[None]:
    """For tidying up, which takes a few seconds at most and must not be left half done."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pause(seconds: float) -> None:
    """Sleep, and raise `Interrupted` if there has been a signal."""
    time.sleep(seconds)
    if _received:
        raise Interrupted(_received[0])


def was_interrupted() -> bool:
    return bool(_received)


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > 1:
        raise Interrupted(number)
