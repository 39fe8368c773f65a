"""The sweeper: sends deliveries that are due to the service's own queue.

Every worker runs one, in a thread; they share the work by skipping each other's rows. What is sent
stays owed until it is settled, and is sent again if nothing is heard of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from outbox import pending
from outbox.bell import Bell
from outbox.pending import PendingDelivery
from outbox.sql import DEFAULT_SCHEMA

log = logging.getLogger(__name__)

Send = Callable[[Sequence[PendingDelivery]], None]
"""Sends messages to the service's own queue. Raises if the broker did not take them all."""


@dataclass(frozen=True)
class SweepSettings:
    """How often to look, and how long to wait for what was sent."""

    batch: int = 100
    shortest: timedelta = timedelta(milliseconds=50)
    """Pause between two looks right after something was due; doubles while nothing is."""
    longest: timedelta = timedelta(seconds=1)
    """Longest pause: what is scheduled for now is sent after this much at the latest."""
    resend_after: timedelta = timedelta(seconds=60)
    """How long until what was sent, and not heard of since, is sent again; doubles each time."""
    resend_cap: timedelta = timedelta(hours=1)
    chores_every: timedelta = timedelta(hours=1)
    declare_every: timedelta = timedelta(seconds=30)
    """How often the queue and its bindings are made again, should the broker have lost them."""


class Sweeper:
    """Looks for what is due and sends it, until stopped."""

    def __init__(
        self,
        service: str,
        engine: Engine | Callable[[], Engine],
        send: Send,
        *,
        schema: str = DEFAULT_SCHEMA,
        settings: SweepSettings | None = None,
        chores: Callable[[], None] | None = None,
        bell: Bell | None = None,
        look: Callable[[], None] | None = None,
    ) -> None:
        """*chores* are done at the start and every `chores_every`, in the same thread.

        *look* is called at every round: for what is missed (`outbox.vigil`), and seldom does anything.

        *bell*, when rung, makes it look at once.
        """
        self._service = service
        self._schema = schema
        self._engine = engine
        self._send = send
        self._settings = settings or SweepSettings()
        self._chores = chores
        self._look = look
        self._chores_due_at = time.monotonic()
        self._unsent: Sequence[PendingDelivery] = ()
        self._next_due_in: float | None = None
        self._pause = self._settings.shortest.total_seconds()
        self._bell = bell or Bell()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, in a thread that does not keep the process alive."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self.run, name="outbox-sweeper", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Ask it to end and wait for that, *timeout* seconds at most."""
        self._stopping.set()
        self._bell.ring()
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None

    def run(self) -> None:
        """Sweep until stopped. Errors are logged and the sweep tried again, ever less often."""
        failures = 0
        while not self._stopping.is_set():
            try:
                pause = self._round()
                failures = 0
            except Exception as error:
                failures += 1
                pause = min(30.0, 0.1 * 2.0 ** min(failures, 20))
                log.warning("sweeping %s failed, again in %.1f s: %s", self._service, pause, error)
            if self._bell.wait(pause):
                self._pause = self._settings.shortest.total_seconds()

    def sweep(self) -> int:
        """Send what is due now, one batch at most; returns how many."""
        if not self._unsent:
            self._unsent = self._claim()
        sent = len(self._unsent)
        if sent:
            # Kept until the broker has them: they are put off for long and would wait for nothing.
            self._send(self._unsent)
            self._unsent = ()
        return sent

    def _round(self) -> float:
        self._do_chores()
        self._look_after()
        if self.sweep():
            self._pause = self._settings.shortest.total_seconds()
            return 0.0
        pause = self._pause
        self._pause = min(self._pause * 2, self._settings.longest.total_seconds())
        return pause if self._next_due_in is None else max(0.0, min(pause, self._next_due_in))

    def _do_chores(self) -> None:
        if self._chores is None or time.monotonic() < self._chores_due_at:
            return
        self._chores_due_at = time.monotonic() + self._settings.chores_every.total_seconds()
        try:
            self._chores()
        except Exception:
            log.exception("upkeep of the tables of %s failed", self._service)

    def _look_after(self) -> None:
        if self._look is None:
            return
        try:
            self._look()
        except Exception as error:
            log.warning("looking for what %s misses failed: %s", self._service, error)

    def _claim(self) -> Sequence[PendingDelivery]:
        """What is due; where nothing is, it is noted how long until then."""
        with Session(self._get_engine()) as session, session.begin():
            due = pending.claim_due(
                session,
                self._service,
                limit=self._settings.batch,
                resend_after=self._settings.resend_after,
                resend_cap=self._settings.resend_cap,
                schema=self._schema,
            )
            wait = None
            if not due:
                wait = pending.until_due(session, self._service, schema=self._schema)
        self._next_due_in = None if wait is None else wait.total_seconds()
        return due

    def _get_engine(self) -> Engine:
        return self._engine if isinstance(self._engine, Engine) else self._engine()
