"""A bell between processes: rung in a child of the worker, heard by the sweeper in its parent."""

from __future__ import annotations

import contextlib
import os
import select


class Bell:
    """Made before a fork, it connects both sides. Ringing never blocks and may be heard late."""

    def __init__(self) -> None:
        self._ears, self._rope = os.pipe()
        for end in (self._ears, self._rope):
            os.set_blocking(end, False)

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

    def close(self) -> None:
        """Give its two file descriptors back."""
        for end in (self._ears, self._rope):
            os.close(end)
