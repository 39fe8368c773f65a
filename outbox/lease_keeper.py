"""The thread that keeps a relay's lanes while the other one relays, and leaves them when that one gets nowhere.

So a slow broker does not cost the lanes; and a relay that is stalled, or that its broker refuses everything, does not
keep them from relays that could do better. It trusts the lanes only for as long as its heartbeats do (`outbox.lanes`),
so whatever becomes of this thread, the worst is that a lane is read by nobody until another relay takes it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import psycopg

from outbox.errors import told
from outbox.lanes import BEAT_EVERY, Leases
from outbox.pipeline import RelayStats

log = logging.getLogger(__name__)

_LONGEST_STALL: Final = 60.0
_AWAY: Final = 2
"""For how many times as long as it was refused a relay leaves its lanes to others."""

Connect = Callable[[], psycopg.Connection[Any]]


class LeaseKeeper:
    """Keeps lanes from `start` to `finish`."""

    def __init__(
        self,
        connect: Connect,
        schema: str,
        *,
        time_to_live: timedelta,
        longest_refusal: timedelta,
        stats: RelayStats,
        changed: Callable[[], object],
    ) -> None:
        """*changed* is called when other lanes are held than before, *stats* says how the broker takes what is sent.

        *longest_refusal*: after so long without one confirmation the lanes are left to other relays, where any live.
        """
        self._connect = connect
        self._schema = schema
        self._time_to_live = time_to_live
        self._longest_refusal = longest_refusal.total_seconds()
        self._stats = stats
        self._changed = changed
        self._leases: Leases | None = None
        self._progress = time.monotonic()
        self._stopping = threading.Event()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox leases", daemon=True)

    def start(self) -> None:
        """Begin to take lanes."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more; what is held is kept until `finish`."""
        self._stopping.set()

    def finish(self) -> None:
        """Give all lanes back; nothing is sent any more."""
        self._stopping.set()
        self._finished.set()
        self._thread.join(timeout=10)

    def held(self) -> dict[int, int]:
        """The lanes that may be read now, with their epochs."""
        leases = self._leases
        return dict(leases.held) if leases is not None and leases.trusted() else {}

    def note_progress(self, now: float) -> None:
        """The relaying thread is not stalled."""
        self._progress = now

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._connect() as connection:
                    self._keep(Leases(connection, self._schema, self._time_to_live))
            except psycopg.Error as error:
                self._leases = None
                log.warning("leases: %s", told(error))
                self._stopping.wait(0.5)
            except Exception:
                # A relay without this thread would hold no lane and say nothing.
                self._leases = None
                log.exception("leases: unexpected; beginning again")
                self._stopping.wait(0.5)

    def _keep(self, leases: Leases) -> None:
        while not self._stopping.is_set():
            if time.monotonic() - self._progress > _LONGEST_STALL:
                log.error(
                    "no progress for %.0f s: leaving the lanes to other relays", _LONGEST_STALL
                )
                self._leases = None
            elif self._stats.refused_for() > self._longest_refusal and leases.others_live:
                self._stay_away(leases)
                continue
            else:
                self._beat(leases)
            self._stopping.wait(BEAT_EVERY.total_seconds())
        self._finished.wait(20)
        leases.release()
        self._leases = None

    def _beat(self, leases: Leases) -> None:
        before = leases.held
        leases.beat()
        self._leases = leases
        if leases.held != before:
            self._changed()

    def _stay_away(self, leases: Leases) -> None:
        """Another relay may reach the broker. One that lives alone keeps trying instead."""
        away = self._longest_refusal * _AWAY
        log.error(
            "the broker has confirmed nothing for %.0f s: leaving the lanes to other relays for %.0f s",
            self._longest_refusal, away,
        )  # fmt: skip
        leases.release()
        self._leases = None
        self._changed()
        self._stopping.wait(away)
        self._stats.forgive()
