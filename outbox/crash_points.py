"""Named places where a test can have the process killed, as by SIGKILL and a power cut.

Active only with `OUTBOX_TEST=1` and `OUTBOX_CRASH_AT=<name>:<count>` in the environment at import: the process dies
the moment it passes the named place for the count-th time.
"""

from __future__ import annotations

import os
import signal


class _Armed:
    """Counts passes of one place."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.left = name, count

    def passed(self, name: str) -> None:
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _armed() -> _Armed | None:
    name, _, count = os.environ.get("OUTBOX_CRASH_AT", "").partition(":")
    return _Armed(name, int(count or 1)) if name and os.environ.get("OUTBOX_TEST") == "1" else None


_point = _armed()


def crash_point(name: str) -> None:
    """A process armed for *name* ends here."""
    if _point is not None:
        _point.passed(name)
