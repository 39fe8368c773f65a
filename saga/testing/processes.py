"""Simulated processes: greenlets that stop at every statement, commit and message, for the scheduler to choose from.

A process that is killed runs nothing any more: its connections are gone (the server rolls back) and whatever its code
still tries, in an `except` or a `finally`, meets that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from greenlet import GreenletExit, getcurrent, greenlet

from saga.testing.model import ModelDatabase
from saga.testing.model.driver import Connection
from saga.testing.model.storage import Transaction


class Killed(GreenletExit):
    """The process is gone: SIGKILL, out of memory, a power cut."""


class Process:
    """One thing that runs: a worker with its message, a relay with its page, a request."""

    def __init__(self, name: str, service: str, run: Callable[[], None], hub: Hub) -> None:
        self.name = name
        self.service = service
        self.at = "begin"
        """Where it stopped: the SQL, "commit", "committed", or a point of its own."""
        self.dead = False
        self.error: BaseException | None = None
        self.messages: list[Any] = []
        """What it took from its queue."""
        """What it took from a queue, if it is a worker."""
        self.connections: list[Connection] = []
        self._blocked: Callable[[], bool] | None = None
        self._greenlet = greenlet(lambda: self._guarded(run), parent=hub.greenlet)

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except GreenletExit:
            pass
        except BaseException as error:
            self.error = error

    @property
    def finished(self) -> bool:
        return self.dead or self._greenlet.dead

    @property
    def ready(self) -> bool:
        return not self.finished and (self._blocked is None or not self._blocked())

    def go_on(self) -> None:
        self._blocked = None
        self._greenlet.switch()

    def stop_at(self, point: str) -> None:
        """Called by the process itself: give the scheduler its turn."""
        self.at = point
        parent = self._greenlet.parent
        assert parent is not None
        parent.switch()
        if self.dead:
            raise Killed

    def wait_while(self, blocked: Callable[[], bool]) -> None:
        while blocked():
            self._blocked = blocked
            self.stop_at("waits for a lock")

    def kill(self) -> None:
        self.dead = True
        self._drop_connections()
        if not self._greenlet.dead:
            self._greenlet.throw(Killed)

    def lose_connection(self) -> bool:
        """Break the database connection that it is using; False where it has none in a transaction."""
        used = [connection for connection in self.connections if not connection.closed]
        self._drop_connections()
        return bool(used)

    def _drop_connections(self) -> None:
        for connection in self.connections:
            connection.lose()
        self.connections.clear()


class Hub:
    """Knows which process runs, and routes what databases ask of it."""

    def __init__(self) -> None:
        self.greenlet = getcurrent()
        self.processes: list[Process] = []

    def start(self, name: str, service: str, run: Callable[[], None]) -> Process:
        process = Process(name, service, run, self)
        self.processes.append(process)
        return process

    def current(self) -> Process | None:
        running = getcurrent()
        return next((one for one in self.processes if one._greenlet is running), None)

    def stop_at(self, point: str) -> None:
        process = self.current()
        if process is not None:
            if process.dead:
                raise Killed
            process.stop_at(point)

    def wait(self, _waiter: Transaction, blocked: Callable[[], bool]) -> None:
        process = self.current()
        if process is None:
            raise psycopg.errors.LockNotAvailable("nobody else runs who could give the lock back")
        process.wait_while(blocked)

    def connected(self, connection: Connection) -> None:
        process = self.current()
        if process is not None:
            if process.dead:
                raise psycopg.OperationalError("the process is gone")
            process.connections.append(connection)

    def attach(self, database: ModelDatabase) -> None:
        """Let this hub schedule everything that happens on *database*."""
        database.on_step = self.stop_at
        database.on_connect = self.connected
        database.storage.wait = self.wait

    def sweep(self) -> list[Any]:
        """Forget finished processes; their errors, if any."""
        errors = [
            process for process in self.processes if process.finished and process.error is not None
        ]
        self.processes = [process for process in self.processes if not process.finished]
        return errors
