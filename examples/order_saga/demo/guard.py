"""Ends what the demo leaves behind if it dies without tidying up, even by SIGKILL.

A process of its own, in a session of its own. It waits on a pipe that closes with the demo, and then ends the process
groups and removes the directories that it was told of. Uses the standard library only, so that it is there at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 5.0
LOOK_EVERY_SECONDS = 0.05


class Guard:
    """The demo's end of the pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def watch_group(self, group: int, stop_signal: signal.Signals) -> None:
        self._say(f"group {group} {int(stop_signal)}")

    def forget_group(self, group: int) -> None:
        self._say(f"ended {group}")

    def watch_directory(self, directory: Path) -> None:
        self._say(f"directory {directory}")

    def forget_directory(self, directory: Path) -> None:
        self._say(f"removed {directory}")

    def dismiss(self) -> None:
        """Close the pipe: whatever is still being watched is ended now."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, int] = {}
    directories: set[str] = set()
    for line in sys.stdin:
        match line.rstrip("\n").split(" ", 1):
            case ["group", rest]:
                group, stop_signal = map(int, rest.split())
                groups[group] = stop_signal
            case ["ended", group_text]:
                groups.pop(int(group_text), None)
            case ["directory", directory]:
                directories.add(directory)
            case ["removed", directory]:
                directories.discard(directory)
    end(groups)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def end(groups: dict[int, int]) -> None:
    """Ask each group to end, and after a while make it."""
    for group, stop_signal in groups.items():
        send(group, stop_signal)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(map(is_there, groups)) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_SECONDS)
    for group in groups:
        send(group, signal.SIGKILL)


def send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    main()
