"""Whoever publishes wakes the relays, whatever becomes of the bell; without it, events come all the same.

The relays here pause for a minute where nobody wakes them, and each test waits for less.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

import outbox
from outbox import doorbell, listening
from outbox.doorbell import Doorbell, bells
from outbox.errors import ConfigurationError
from outbox.relay import Relay
from tests.integration.test_publish import KINDS
from tests.integration.test_relay import (
    Made,
    MemoryBus,
    conninfo,
    publish,
    registry,
    running,
    until,
)
from tests.local_servers import LocalPgBouncer, LocalPostgres

MINUTE = timedelta(minutes=1)
LISTENING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
)
RINGING = LISTENING.replace("LISTEN", "NOTIFY")


def sessions(engine: Engine, sql: str) -> set[int]:
    with engine.connect() as connection:
        return set(connection.scalars(text(sql)))


def end(engine: Engine, sql: str) -> set[int]:
    """Terminate those sessions, and return which these were."""
    ended = sessions(engine, sql)
    with engine.connect() as connection:
        for pid in ended:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    until(lambda: not ended & sessions(engine, sql))
    return ended


@contextmanager
def pausing(engine: Engine, bus: MemoryBus) -> Iterator[Relay]:
    """A relay that has its lanes, listens and does not look by itself."""
    with running(engine, bus, shortest_pause=MINUTE, longest_pause=MINUTE) as relay:
        until(lambda: len(relay._held()) == 16 and bool(sessions(engine, LISTENING)))
        publish(engine, -1)
        ring(engine)
        bus.await_numbers({-1})
        bus.taken.remove(-1)
        yield relay


def ring(engine: Engine) -> None:
    with psycopg.connect(conninfo(engine), autocommit=True) as connection:
        connection.execute("NOTIFY outbox_outbox")


@pytest.fixture
def bell(migrated_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Doorbell:
    """Rings for every event: the relays here do not look again soon after one, as they should."""
    monkeypatch.setattr(doorbell, "_AWAKE", 0.0)
    return outbox.wake_relays(migrated_engine)


@KINDS
@pytest.mark.usefixtures("bell")
def test_a_pausing_relay_is_woken_whatever_the_event_is_published_through(
    migrated_engine: Engine, opened: Callable[..., Any]
) -> None:
    bus = MemoryBus()
    with pausing(migrated_engine, bus):
        for number in range(3):
            with opened(migrated_engine) as connection:
                outbox.publish(connection, Made(number, number), registry=registry)
                connection.commit()
            bus.await_numbers({number})


@pytest.mark.usefixtures("bell")
def test_an_event_that_is_committed_long_after_it_was_published_is_found(
    migrated_engine: Engine,
) -> None:
    bus = MemoryBus()
    with pausing(migrated_engine, bus), Session(migrated_engine) as session:
        session.begin_nested()
        outbox.publish(session, Made(0, 0), registry=registry)
        threading.Event().wait(1)  # the relay looks for it in vain meanwhile
        session.commit()
        bus.await_numbers({0})


@pytest.mark.usefixtures("bell")
def test_what_is_rolled_back_rings_in_vain(migrated_engine: Engine) -> None:
    bus = MemoryBus()
    with pausing(migrated_engine, bus), Session(migrated_engine) as session:
        outbox.publish(session, Made(0, 0), registry=registry)
        session.rollback()
        with session.begin_nested() as savepoint:
            outbox.publish(session, Made(1, 1), registry=registry)
            savepoint.rollback()
        outbox.publish(session, Made(2, 2), registry=registry)
        session.commit()
        bus.await_numbers({2})
    assert bus.taken == [2]


@pytest.mark.usefixtures("bell")
def test_a_relay_whose_listening_session_ends_looks_at_once_and_listens_again(
    migrated_engine: Engine,
) -> None:
    bus = MemoryBus()
    with pausing(migrated_engine, bus):
        ended = end(migrated_engine, LISTENING)
        publish(migrated_engine, 0)
        bus.await_numbers({0})
        until(lambda: bool(sessions(migrated_engine, LISTENING) - ended))
        publish(migrated_engine, 1)
        bus.await_numbers({1})


@pytest.mark.usefixtures("bell")
def test_a_ringing_session_that_ends_is_made_again(migrated_engine: Engine) -> None:
    bus = MemoryBus()
    with pausing(migrated_engine, bus):
        publish(migrated_engine, 0)
        bus.await_numbers({0})
        assert end(migrated_engine, RINGING)
        publish(migrated_engine, 1)
        bus.await_numbers({1})


FORKING = """
import os, sys
sys.path[:0] = [{root!r}]
from sqlalchemy import create_engine
import outbox
from tests.integration.test_relay import publish
engine = create_engine({url!r})
outbox.wake_relays(engine)
publish(engine, 0)
if sys.stdin.readline() and os.fork() == 0:
    engine.dispose(close=False)
    publish(engine, 1)
    sys.stdin.readline()
    os._exit(0)
sys.stdin.readline()
publish(engine, 2)
sys.stdin.readline()
"""


def test_a_forked_process_rings_by_itself_and_its_parent_goes_on(migrated_engine: Engine) -> None:
    bus = MemoryBus()
    url = migrated_engine.url.render_as_string(hide_password=False)
    code = FORKING.format(root=str(Path(__file__).parents[2]), url=url)
    with (
        pausing(migrated_engine, bus),
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, bufsize=0) as process,
    ):
        assert process.stdin is not None
        for number in range(3):
            bus.await_numbers({number})
            ringing = sessions(migrated_engine, RINGING)
            assert len(ringing) == (1 if number == 0 else 2)
            process.stdin.write(b"\n")
        process.stdin.close()


def test_a_writer_does_not_wait_for_a_bell_that_hangs(migrated_engine: Engine) -> None:
    entered, released = threading.Event(), threading.Event()

    def hang() -> Any:
        entered.set()
        released.wait()
        raise psycopg.OperationalError("never answered")

    outbox.wake_relays(create_engine("postgresql+psycopg://", creator=hang))
    try:
        publish(migrated_engine, *range(5))
        assert entered.wait(20)
        publish(migrated_engine, *range(5, 10))
        assert not released.is_set()
    finally:
        released.set()
    bus = MemoryBus()
    with running(migrated_engine, bus):
        bus.await_numbers(set(range(10)))


def test_a_bell_that_cannot_ring_says_so_once_and_keeps_nothing_back(
    migrated_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Any:
        raise psycopg.OperationalError("not here")

    bell = outbox.wake_relays(create_engine("postgresql+psycopg://", creator=refuse))
    bus = MemoryBus()
    with running(migrated_engine, bus):
        for number in range(20):
            publish(migrated_engine, number)
            bell.ring()
        bus.await_numbers(set(range(20)))
        until(lambda: "not here" in caplog.text)
    assert caplog.text.count("relays are not woken") == 1


@pytest.mark.usefixtures("bell")
def test_a_relay_that_cannot_listen_looks_by_itself(
    migrated_engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: object) -> bool:
        raise psycopg.OperationalError("too many connections")

    monkeypatch.setattr(listening, "is_pooled", refuse)
    bus = MemoryBus()
    with running(migrated_engine, bus):
        for number in range(5):
            publish(migrated_engine, number)
            bus.await_numbers({number})
    assert "too many connections" in caplog.text


def test_a_relay_behind_a_pooler_looks_by_itself_and_one_beside_it_is_woken_through_it(
    make_pooler: Callable[..., LocalPgBouncer],
    migrated_engine: Engine,
    make_engine: Callable[..., Engine],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    url = migrated_engine.url.render_as_string(hide_password=False)
    pooled = make_engine(make_pooler(url).url, connect_args={"prepare_threshold": None})
    monkeypatch.setattr(doorbell, "_AWAKE", 0.0)
    outbox.wake_relays(pooled)
    bus = MemoryBus()
    with running(pooled, bus):
        for number in range(5):
            publish(pooled, number)
            bus.await_numbers({number})
        until(lambda: "a pooler is between" in caplog.text)
        assert not sessions(migrated_engine, LISTENING)
    with pausing(migrated_engine, bus):
        for number in range(5, 10):
            publish(pooled, number)
            bus.await_numbers({number})
        assert sessions(migrated_engine, RINGING)


def test_ringing_writes_nothing_but_the_end_of_its_own_transaction(
    private_postgres: LocalPostgres, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(private_postgres.url)
    bell = outbox.wake_relays(engine)
    heard = 0
    with psycopg.connect(conninfo(engine), autocommit=True) as connection:
        connection.execute("LISTEN outbox_other")
        where = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
        before = connection.execute(where).fetchone()
        for _ in range(100):
            bell._last.clear()
            bell.ring("other")
            for notification in connection.notifies(timeout=20, stop_after=1):
                assert notification.payload == ""
                heard += 1
        after = connection.execute(where).fetchone()
    assert heard == 100
    assert before is not None
    assert after is not None
    assert after[0] - before[0] < 100 * 100


def test_one_bell_is_enough_for_a_database(migrated_engine: Engine) -> None:
    url = migrated_engine.url.render_as_string(hide_password=False)
    asynchronous = create_async_engine(url)
    told = [outbox.wake_relays(one) for one in (migrated_engine, url, asynchronous)]
    assert told == bells() * 3
    told[0].close()
    assert bells() == []
    with pytest.raises(ConfigurationError, match="Engine or a database URL"):
        outbox.wake_relays(object())  # type: ignore[arg-type]
