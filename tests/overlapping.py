"""Two transactions at once, in an order that the test chooses: one is stopped inside its journal
while the other runs until it is done or waits for a lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Engine, text

from saga import Participant
from saga.journal import Journal
from saga.store import SqlJournal

_CALLS: Final = frozenset(
    {
        "open", "lock", "lock_known", "move", "find", "record", "advance", "runs", "claim", "arrive", "arrivals",
        "append", "schedule", "flush",
    }
)  # fmt: skip
_BLOCKED: Final = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
_TOO_LONG: Final = 30.0

_this_thread = threading.local()


@dataclass
class Stop:
    """Where the first transaction is stopped: right after a call of its journal."""

    after: str
    """The call's name."""
    time: int = 1
    """Which of its calls of that name."""
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def called(self, name: str) -> None:
        if name != self.after:
            return
        self.time -= 1
        if self.time == 0:
            self.reached.set()
            assert self.go_on.wait(_TOO_LONG)


class StoppingJournal(SqlJournal):
    """The real journal, which can be stopped after each call."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        stop: Stop | None = getattr(_this_thread, "stop", None)
        if name not in _CALLS or stop is None:
            return value

        def call(*args: Any, **options: Any) -> Any:
            result = value(*args, **options)
            stop.called(name)
            return result

        return call


class StoppingParticipant(Participant):
    """A participant whose transactions can be stopped."""

    def journal(self, session: Any) -> Journal:
        return StoppingJournal(session, self.name, self.schema, decides=self.decides)


def overlap(
    engine: Engine,
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    after: str,
    time: int = 1,
) -> bool:
    """Run *first* up to its stop, then *second* until it is done or blocked, then both to the end.

    Returns whether *second* had to wait. Nothing else may use the engine's database meanwhile.
    """
    stop = Stop(after, time)
    errors: list[BaseException] = []

    def run_first() -> None:
        _this_thread.stop = stop
        _run(first, errors)
        stop.reached.set()

    one = threading.Thread(target=run_first, daemon=True)
    two = threading.Thread(target=_run, args=(second, errors), daemon=True)
    one.start()
    assert stop.reached.wait(_TOO_LONG)
    two.start()
    waited = _blocked(engine, two)
    stop.go_on.set()
    for thread in (one, two):
        thread.join(_TOO_LONG)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return waited


def _run(what: Callable[[], object], errors: list[BaseException]) -> None:
    try:
        what()
    except BaseException as error:
        errors.append(error)


def _blocked(engine: Engine, thread: threading.Thread) -> bool:
    with engine.connect() as connection:
        while thread.is_alive():
            if connection.execute(_BLOCKED).scalar_one():
                return True
            connection.rollback()
            thread.join(0.002)
    return False
