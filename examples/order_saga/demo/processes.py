"""Real processes: each leads a group of its own and writes a log; none of them outlives the demo."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from examples.order_saga.demo.guard import Guard
from examples.order_saga.demo.interrupts import pause

STOP_WITHIN_SECONDS = 6.0
LOOK_EVERY_SECONDS = 0.05
SHOWN_LINES = 25


class ProcessFailed(Exception):
    """A process ended by itself, or did not become ready; with the end of its log."""


class Process:
    """One process that the demo starts, stops or kills, perhaps several times."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        guard: Guard,
        log: Path,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log = log
        self._command = [str(part) for part in command]
        self._guard = guard
        self._directory = directory
        self._environment = {**os.environ, **(environment or {})}
        self._user = user
        self._stop_signal = stop_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                env=self._environment,
                user=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._guard.watch_group(self._process.pid, self._stop_signal)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raise `ProcessFailed` if it is not running."""
        if not self.is_running:
            code = None if self._process is None else self._process.returncode
            raise ProcessFailed(f"{self.name} ended by itself (exit code {code})\n{self.tail()}")

    def ask_to_stop(self) -> None:
        if self.is_running:
            self._signal(self._stop_signal)

    def wait_or_kill(self, until: float) -> None:
        """Wait until the monotonic time given, then end the whole group, whoever is left in it."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(until - time.monotonic(), 0.0))
        self.kill()

    def wait(self) -> None:
        """Wait for its end; whoever else is in its group goes on."""
        if self._process is not None:
            self._process.wait()

    def kill(self) -> None:
        """SIGKILL to the group: no goodbye, as when a machine dies."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._guard.forget_group(self._process.pid)

    def has_logged(self, text: str) -> bool:
        """Whether *text* is in what it logged since it was last started."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return text.encode() in log.read()

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        return "\n".join(f"    {self.name} | {line}" for line in lines)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def stop_all(processes: Iterable[Process]) -> None:
    """Ask all of them at once, wait a little, then kill what is left."""
    asked = list(processes)
    for process in asked:
        process.ask_to_stop()
    until = time.monotonic() + STOP_WITHIN_SECONDS
    for process in asked:
        process.wait_or_kill(until)


def wait_until_ready(process: Process, ready: Callable[[], bool], *, within: float = 60.0) -> None:
    """Wait for the condition. Raises `ProcessFailed` when the process ends or takes too long."""
    deadline = time.monotonic() + within
    while not ready():
        process.check()
        if time.monotonic() > deadline:
            raise ProcessFailed(f"{process.name} was not ready in {within:g} s\n{process.tail()}")
        pause(LOOK_EVERY_SECONDS)
