"""A bell between processes, threads and signal handlers of one machine.

A child of the worker rings for the sweeper in its parent; whoever stops a relay, or hears for it, rings for its thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import weakref


class Bell:
    """Made before a fork, it connects both sides. Ringing never blocks and may be heard late."""

    def __init__(self) -> None:
        self._ears, self._rope = os.pipe()
        for end in (self._ears, self._rope):
            os.set_blocking(end, False)
        self._close = weakref.finalize(self, _close, self._ears, self._rope)
        self._close.atexit = False

    def ring(self) -> None:
        """Make the current or the next `wait` return."""
        # Full: it is ringing already.
        with contextlib.suppress(BlockingIOError):
            os.write(self._rope, b"!")

    def wait(self, timeout: float) -> bool:
        """Wait until it rings, *timeout* seconds at most; whether it did."""
        heard, _, _ = select.select([self._ears], [], [], max(0.0, timeout))
        if not heard:
            return False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._ears, 4_096):
                pass
        return True

    def fileno(self) -> int:
        """For `select`: readable once it has been rung."""
        return self._ears

    def close(self) -> None:
        """Give its two file descriptors back, as happens when nobody has it any more."""
        self._close()


def _close(*ends: int) -> None:
    for end in ends:
        os.close(end)
