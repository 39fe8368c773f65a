"""A relay that is paused, at whatever moment: others go on in its place, and it does no harm when it comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import Engine, text

from outbox.buses.base import OutgoingMessage
from outbox.cursors import CursorStore
from outbox.envelope import decode
from outbox.lanes import Leases
from outbox.partitions import Partitions
from outbox.reader import Cursor
from outbox.snapshot import Snapshot
from outbox.sql import briefly
from tests.integration.test_relay import (
    FileBus,
    MemoryBus,
    conninfo,
    numbers,
    numbers_of,
    running,
    spawn,
    until,
)
from tests.integration.test_spread import publish, shares

STOPS_AT = 1_000
LAST = 4_000
PROCESS = """
import sys
sys.path[:0] = [{root!r}]
from tests.integration.test_paused_relays import StoppingBus
from outbox.relay import Relay
Relay({url!r}, StoppingBus({path!r}, MOMENT)).run()
"""


class StoppingBus(FileBus):
    """Stops its process, once, when it has sent the batch with event 1,000 or is about to: all of its threads."""

    def __init__(self, path: str, moment: str) -> None:
        super().__init__(path)
        self.moment = moment

    def send(self, batch: Sequence[OutgoingMessage]) -> Any:
        moment = self.moment if max(numbers_of(batch), default=0) >= STOPS_AT else ""
        if moment == "before":
            self._stop()
        confirmation = super().send(batch)
        if moment == "after":
            self._stop()
        return confirmation

    def _stop(self) -> None:
        self.moment = ""
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture
def spawn_stopping(
    migrated_engine: Engine, tmp_path: Path
) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a relay in a process with a `StoppingBus`, which writes to `sent`."""
    with ExitStack() as stack:

        def spawn_one(moment: str) -> subprocess.Popen[bytes]:
            code = PROCESS.replace("MOMENT", repr(moment))
            process = spawn(migrated_engine, tmp_path / "sent", code=code)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield spawn_one


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def stored(engine: Engine) -> set[int]:
    """The events that stored cursors have passed."""
    with engine.connect() as connection:
        bodies = connection.scalars(
            text(
                "WITH newest AS (SELECT DISTINCT ON (lane) lane, hi FROM outbox.outbox_cursor "
                "ORDER BY lane, epoch DESC, seq DESC) "
                "SELECT body FROM outbox.outbox_event JOIN newest USING (lane) WHERE position <= hi"
            )
        )
        return {decode(body).data["number"] for body in bodies}


def assert_no_cursor_ever_moved_back(engine: Engine) -> None:
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT lane, epoch, hi FROM outbox.outbox_cursor ORDER BY lane, stored_at, seq")
        ).all()
    for lane, of_lane in groupby(rows, lambda row: row.lane):
        steps = [(row.epoch, row.hi) for row in of_lane]
        assert steps == sorted(steps, key=lambda step: step[0]), f"lane {lane}: an older epoch"
        assert steps == sorted(steps, key=lambda step: step[1]), f"lane {lane}: a lower position"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_paused_relay_is_replaced_and_moves_no_cursor_back_when_it_goes_on(
    migrated_engine: Engine,
    tmp_path: Path,
    spawn_stopping: Callable[[str], subprocess.Popen[bytes]],
    moment: str,
) -> None:
    """Stopped *before* or *after* it has handed a page to the broker, with pages before it still unconfirmed."""
    path, bus = tmp_path / "sent", MemoryBus()
    paused = spawn_stopping(moment)
    with running(migrated_engine, bus) as heir:
        until(lambda: shares(migrated_engine) == [8, 8])
        publish(migrated_engine, *range(STOPS_AT))
        until(lambda: {*numbers(path), *bus.taken} == set(range(STOPS_AT)))
        publish(migrated_engine, *range(STOPS_AT, LAST))
        until(lambda: is_stopped(paused))
        began = time.monotonic()
        passed = stored(migrated_engine) - set(bus.taken)
        publish(migrated_engine, LAST)
        until(lambda: {*numbers(path), *bus.taken} == set(range(LAST + 1)))
        assert time.monotonic() - began < 5
        until(lambda: len(heir._held()) == 16)
        before = numbers(path)

        paused.send_signal(signal.SIGCONT)
        until(lambda: shares(migrated_engine) == [8, 8])
        publish(migrated_engine, *range(LAST + 1, LAST + 101))
        until(lambda: {*numbers(path), *bus.taken} == set(range(LAST + 101)))
    assert passed
    assert not passed & set(bus.taken), "sent again though its cursor had passed it"
    late = [number for number in numbers(path)[len(before) :] if number <= LAST]
    assert bool(late) == (moment == "before"), "a page that was on its way, and nothing more"
    assert len(late) <= 1024
    since = Counter([*numbers(path), *bus.taken])
    assert {since[number] for number in range(LAST + 1, LAST + 101)} == {1}
    assert_no_cursor_ever_moved_back(migrated_engine)


def test_a_relay_that_was_paused_alone_goes_on_with_its_lanes(
    migrated_engine: Engine,
    tmp_path: Path,
    spawn_stopping: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    """Nobody has taken them meanwhile, and nobody will, as it is seen to live."""
    paused = spawn_stopping("after")
    until(lambda: shares(migrated_engine) == [16])
    publish(migrated_engine, *range(LAST))
    until(lambda: is_stopped(paused))

    def is_taken_for_dead() -> bool:
        with migrated_engine.connect() as connection:
            live = text("SELECT count(*) FROM outbox.outbox_heartbeat WHERE expires_at > now()")
            return connection.scalar(live) == 0

    until(is_taken_for_dead)
    paused.send_signal(signal.SIGCONT)
    until(lambda: set(numbers(tmp_path / "sent")) == set(range(LAST)))
    assert_no_cursor_ever_moved_back(migrated_engine)


def test_of_the_lanes_that_nobody_took_from_a_paused_relay_it_leaves_newcomers_their_share(
    migrated_engine: Engine,
) -> None:
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        paused = Leases(connection, time_to_live=timedelta(seconds=0.6))
        paused.beat()
        until(lambda: not paused.trusted())
        newcomer = Leases(connection)
        connection.execute("UPDATE outbox.outbox_heartbeat SET expires_at = now() + interval '1h'")
        newcomer.beat()
        assert newcomer.held == {}
        for leases in (paused, newcomer):
            leases.beat()
        assert len(paused.held) == len(newcomer.held) == 8


# ---- locks that others would wait for ----


@pytest.fixture
def connect(migrated_engine: Engine) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            psycopg.connect(conninfo(migrated_engine), autocommit=True)
        )


class Pause:
    """Makes whoever runs a statement that begins with *word* rest after it, for as long as the context is open."""

    def __init__(self, connection: psycopg.Connection[Any], word: str) -> None:
        self._connection = connection
        self._word = word.encode()
        self.reached, self._go_on = threading.Event(), threading.Event()
        self._execute = connection.execute
        connection.execute = self._execute_and_rest  # type: ignore[method-assign]

    def _execute_and_rest(self, query: Any, *arguments: Any, **options: Any) -> Any:
        result = self._execute(query, *arguments, **options)
        if isinstance(query, bytes) and query.startswith(self._word):
            self.reached.set()
            assert self._go_on.wait(30)
        return result

    def __enter__(self) -> None:
        assert self.reached.wait(30)

    def __exit__(self, *_: object) -> None:
        self._go_on.set()


def test_a_relay_that_is_paused_amid_maintenance_keeps_no_writer_waiting(
    migrated_engine: Engine, connect: Callable[[], psycopg.Connection[Any]]
) -> None:
    """The partition that it was about to drop is dropped by the next one."""
    bus, other = MemoryBus(), connect()
    publish(migrated_engine, 1)
    with running(migrated_engine, bus):
        bus.await_numbers({1})
    other.execute("SELECT setval('outbox.outbox_event_position', 1500000)")
    Partitions(other).maintain()
    paused = connect()
    with ThreadPoolExecutor(1) as threads:
        pause = Pause(paused, "DROP")
        maintaining = threads.submit(Partitions(paused, retention=timedelta(0)).maintain)
        with pause:
            other.execute("SET lock_timeout = '5s'")
            other.execute(
                "INSERT INTO outbox.outbox_event (lane, event_id, type, version, body) "
                "VALUES (0, gen_random_uuid(), 'thing.made', 1, 'x')"
            )
        with pytest.raises(psycopg.Error, match="idle"):
            maintaining.result()
    Partitions(other, retention=timedelta(0)).maintain()
    assert "outbox_event_p000000000000" not in Partitions(other)._bounds()


def test_a_relay_that_was_cut_off_for_that_goes_on_with_new_connections(
    migrated_engine: Engine,
    connect: Callable[[], psycopg.Connection[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus, other, maintain, pauses = MemoryBus(), connect(), Partitions.maintain, [1]

    def maintain_with_a_pause(partitions: Partitions) -> None:
        while pauses:
            pauses.pop()
            with partitions._connection.transaction():
                partitions._run(briefly("50ms"))
                until(lambda: is_cut_off(partitions._connection))
                partitions._run("SELECT 1")
        maintain(partitions)

    def is_cut_off(connection: psycopg.Connection[Any]) -> bool:
        pid = connection.info.backend_pid
        return not other.execute("SELECT FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchall()

    monkeypatch.setattr(Partitions, "maintain", maintain_with_a_pause)
    monkeypatch.setattr("outbox.relay._CHORES_EVERY", 0.2)
    with running(migrated_engine, bus):
        until(lambda: not pauses)
        publish(migrated_engine, 1)
        bus.await_numbers({1})
    assert "idle-in-transaction timeout; connecting again" in caplog.text
    assert "unexpected" not in caplog.text


def test_a_relay_that_is_paused_amid_the_rotation_of_cursors_keeps_no_other_waiting(
    connect: Callable[[], psycopg.Connection[Any]],
) -> None:
    paused, other = connect(), connect()
    leases = Leases(paused)
    leases.beat()
    store = CursorStore(paused)
    store.store(Cursor(dict.fromkeys(range(16), 7), Snapshot("100:100:")), leases.held)
    with ThreadPoolExecutor(1) as threads:
        pause = Pause(paused, "TRUNCATE")
        rotating = threads.submit(store.rotate, when_over=1)
        with pause:
            other.execute("SET lock_timeout = '5s'")
            (cursor,) = CursorStore(other).load(range(16))
        with pytest.raises(psycopg.Error, match="idle"):
            rotating.result()
    assert cursor.his == dict.fromkeys(range(16), 7)
