"""The relay as it runs: everything that commits is sent, whatever dies, and lanes move to those that live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.orm import Session

import outbox
from outbox.buses.base import OutgoingMessage
from outbox.buses.topology import Topology
from outbox.cluster import adopt, check_cluster
from outbox.cursors import CursorStore
from outbox.envelope import decode
from outbox.errors import BusError, ConfigurationError, LeaseLost, SchemaError
from outbox.events import Registry
from outbox.lanes import Leases
from outbox.partitions import Partitions
from outbox.pipeline import Pipeline, RelayStats
from outbox.reader import Cursor, LogReader
from outbox.relay import Relay
from outbox.roll_caller import RollCaller
from outbox.rolls import Wanted, WantedEvent, is_control
from outbox.snapshot import Snapshot
from tests.relaying import running

registry = Registry()


@registry.event("thing.made", key="key")
@dataclass
class Made:
    number: int
    key: int


class MemoryBus:
    """Takes what it is given, unless told otherwise."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.refuses = 0
        self.changed = threading.Condition()

    def declare(self, topology: Topology) -> None: ...

    def send(self, batch: Sequence[OutgoingMessage]) -> _Batch:
        if self.refuses:
            self.refuses -= 1
            raise BusError("not now")
        return _Batch(self, numbers_of(batch))

    def keep_alive(self) -> None: ...

    def close(self) -> None: ...

    def await_numbers(self, numbers: set[int], timeout: float = 20) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: numbers <= set(self.taken), timeout)
        assert done, f"never came: {sorted(numbers - set(self.taken))[:20]}"


@dataclass
class _Batch:
    bus: MemoryBus
    numbers: list[int]

    def wait(self) -> None:
        with self.bus.changed:
            if self.bus.refuses:
                self.bus.refuses -= 1
                raise BusError("no confirm")
            self.bus.taken += self.numbers
            self.bus.changed.notify_all()


def conninfo(engine: Engine) -> str:
    return make_url(engine.url).set(drivername="postgresql").render_as_string(hide_password=False)


def publish(engine: Engine, *numbers: int) -> None:
    with Session(engine) as session, session.begin():
        outbox.publish_all(
            session, [Made(number, number % 7) for number in numbers], registry=registry
        )


def until(condition: Callable[[], bool], timeout: float = 15) -> None:
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        pause.wait(0.02)


def test_what_was_committed_before_and_after_the_start_is_sent_once_and_in_order_per_key(
    migrated_engine: Engine,
) -> None:
    bus = MemoryBus()
    publish(migrated_engine, *range(100))
    with running(migrated_engine, bus):
        bus.await_numbers(set(range(100)))
        for number in range(100, 130):
            publish(migrated_engine, number)
        bus.await_numbers(set(range(130)))
    assert sorted(bus.taken) == list(range(130))
    for key in range(7):
        of_key = [number for number in bus.taken if number % 7 == key]
        assert of_key == sorted(of_key)


def test_a_relay_that_starts_again_goes_on_where_the_last_one_stopped(
    migrated_engine: Engine,
) -> None:
    first, second = MemoryBus(), MemoryBus()
    publish(migrated_engine, *range(50))
    with running(migrated_engine, first):
        first.await_numbers(set(range(50)))
    publish(migrated_engine, *range(50, 60))
    with running(migrated_engine, second):
        second.await_numbers(set(range(50, 60)))
    assert sorted(second.taken) == list(range(50, 60))


def test_a_transaction_held_open_delays_nobody_and_is_not_skipped(migrated_engine: Engine) -> None:
    bus = MemoryBus()
    slow = Session(migrated_engine)
    savepoint = slow.begin_nested()
    outbox.publish(slow, Made(0, 0), registry=registry)
    savepoint.commit()
    with running(migrated_engine, bus):
        publish(migrated_engine, 1)
        bus.await_numbers({1})
        publish(migrated_engine, 2)
        bus.await_numbers({2})
        slow.commit()
        bus.await_numbers({0})
    slow.close()
    assert bus.taken == [1, 2, 0]


def test_a_broker_that_refuses_gets_everything_again(migrated_engine: Engine) -> None:
    bus = MemoryBus()
    bus.refuses = 4
    publish(migrated_engine, *range(40))
    with running(migrated_engine, bus) as relay:
        bus.await_numbers(set(range(40)))
        assert relay.stats.failures == 4
    assert sorted(bus.taken) == list(range(40))


def test_the_pause_after_a_refusal_grows_with_refusals_in_a_row_and_not_with_those_of_long_ago(
    migrated_engine: Engine,
) -> None:
    bus = MemoryBus()
    bus.refuses = 3
    with running(migrated_engine, bus) as relay:
        publish(migrated_engine, 1)
        bus.await_numbers({1})
        until(lambda: relay.stats.confirmed == 1)
        assert (relay.stats.failures, relay.stats.refusals) == (3, 0)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_request_of_a_queue_that_is_gone_stops_no_event(
    migrated_engine: Engine, is_old: bool
) -> None:
    class Picky(MemoryBus):
        refused = 0

        def send(self, batch: Sequence[OutgoingMessage]) -> _Batch:
            if any(message.queue == "gone.events" for message in batch):
                self.refused += 1
                raise BusError("there is no queue gone.events")
            return super().send(batch)

    bus = Picky()
    publish(migrated_engine, 0)
    with migrated_engine.begin() as connection:
        event = connection.execute(
            text("SELECT event_id AS id, lane, position FROM outbox.outbox_event")
        ).one()
        wanted = Wanted(events=(WantedEvent(**event._mapping),)).model_dump_json()
        for queue in ["gone.events"] * 5 + ["here.events"]:
            connection.execute(
                text(
                    "INSERT INTO outbox.replay_request (queue, wanted, asked_at) "
                    "VALUES (:queue, :wanted, now() - make_interval(days => :days))"
                ),
                {"queue": queue, "wanted": wanted, "days": 2 if is_old else 0},
            )
    with running(migrated_engine, bus) as relay:
        until(lambda: bus.taken.count(0) >= 2)
        publish(migrated_engine, *range(1, 200))
        bus.await_numbers(set(range(200)))
        assert bus.refused == relay.stats.failures == 1
    with migrated_engine.connect() as connection:
        left = connection.execute(text("SELECT queue FROM outbox.replay_request")).scalars()
        assert list(left) == ([] if is_old else ["gone.events"] * 5)


def test_an_error_that_no_bus_should_raise_is_logged_and_everything_is_sent_again(
    migrated_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    bus = MemoryBus()
    send, errors = bus.send, [KeyError("a fault of the bus"), ValueError("another")]

    def faulty(batch: Sequence[OutgoingMessage]) -> _Batch:
        if errors:
            raise errors.pop()
        return send(batch)

    bus.send = faulty  # type: ignore[method-assign]
    publish(migrated_engine, *range(40))
    with running(migrated_engine, bus) as relay:
        bus.await_numbers(set(range(40)))
        assert relay.stats.failures == 2
    assert "a fault of the bus" in caplog.text
    assert sorted(bus.taken) == list(range(40))


def test_an_unexpected_error_in_the_leases_thread_is_logged_and_the_lanes_are_taken_again(
    migrated_engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, beat, errors = MemoryBus(), Leases.beat, [ZeroDivisionError("within a beat")]

    def faulty(leases: Leases) -> None:
        if errors:
            raise errors.pop()
        beat(leases)

    monkeypatch.setattr(Leases, "beat", faulty)
    publish(migrated_engine, *range(10))
    with running(migrated_engine, bus):
        bus.await_numbers(set(range(10)))
    assert "within a beat" in caplog.text


def test_a_relay_without_tables_says_what_to_do(database_url: str) -> None:
    with pytest.raises(SchemaError, match="outbox migrate --schema outbox"):
        Relay(database_url, MemoryBus()).run()


def test_a_huge_transaction_that_commits_late_is_sent_page_by_page(migrated_engine: Engine) -> None:
    bus = MemoryBus()
    late = Session(migrated_engine)
    with late.begin_nested():
        outbox.publish_all(
            late, [Made(number, number) for number in range(3000)], registry=registry
        )
    with running(migrated_engine, bus, page_rows=64):
        publish(migrated_engine, *range(3000, 3100))
        bus.await_numbers(set(range(3000, 3100)))
        late.commit()
        bus.await_numbers(set(range(3000)))
        publish(migrated_engine, 3100)
        bus.await_numbers({3100})
    late.close()
    assert sorted(bus.taken) == list(range(3101))


def test_two_relays_share_the_lanes_and_nothing_is_sent_twice_once_they_have(
    migrated_engine: Engine,
) -> None:
    one, two = MemoryBus(), MemoryBus()
    with running(migrated_engine, one) as first, running(migrated_engine, two) as second:
        until(lambda: len(first._held()) == 8 and len(second._held()) == 8)
        publish(migrated_engine, *range(200))
        until(lambda: len(one.taken) + len(two.taken) >= 200)
        assert sorted(one.taken + two.taken) == list(range(200))
        assert one.taken
        assert two.taken


def test_a_relay_that_its_broker_refuses_everything_leaves_its_lanes_to_one_that_gets_through(
    migrated_engine: Engine,
) -> None:
    cut_off, well = MemoryBus(), MemoryBus()
    cut_off.refuses = 1_000_000
    short = {"longest_refusal": timedelta(seconds=1)}
    with (
        running(migrated_engine, cut_off, **short) as first,
        running(migrated_engine, well, **short) as second,
    ):
        until(lambda: len(first._held()) == 8 and len(second._held()) == 8)
        publish(migrated_engine, *range(200))
        well.await_numbers(set(range(200)))
        cut_off.refuses = 0
        until(lambda: len(first._held()) == 8)
        publish(migrated_engine, *range(200, 300))
        until(lambda: set(range(200, 300)) <= set(well.taken + cut_off.taken))


def test_a_relay_that_lives_alone_keeps_its_lanes_however_long_it_is_refused(
    migrated_engine: Engine,
) -> None:
    bus = MemoryBus()
    bus.refuses = 1_000_000
    with running(migrated_engine, bus, longest_refusal=timedelta(milliseconds=1)) as relay:
        publish(migrated_engine, *range(20))
        until(lambda: relay.stats.refusals > 2)
        assert len(relay._held()) == 16
        bus.refuses = 0
        bus.await_numbers(set(range(20)))


def test_lanes_of_a_relay_that_ended_are_taken_at_once(migrated_engine: Engine) -> None:
    bus = MemoryBus()
    with running(migrated_engine, bus) as survivor:
        with running(migrated_engine, MemoryBus()):
            until(lambda: len(survivor._held()) == 8)
        until(lambda: len(survivor._held()) == 16)
        publish(migrated_engine, *range(20))
        bus.await_numbers(set(range(20)))


PROCESS = """
import sys
sys.path[:0] = [{root!r}]
from tests.integration.test_relay import FileBus
from outbox.relay import Relay
Relay({url!r}, FileBus({path!r})).run()
"""


class FileBus(MemoryBus):
    """Writes what it takes to a file, for a relay in a process of its own."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def send(self, batch: Sequence[OutgoingMessage]) -> Any:
        with open(self.path, "a") as file:
            file.write("".join(f"{number}\n" for number in numbers_of(batch)))
        return _Batch(self, [])


def numbers_of(batch: Sequence[OutgoingMessage]) -> list[int]:
    events = [message.body for message in batch if not is_control(message.body)]
    return [decode(event).data["number"] for event in events]


def spawn(
    engine: Engine, path: Path, crash_at: str = "", code: str = PROCESS
) -> subprocess.Popen[bytes]:
    url = engine.url.render_as_string(hide_password=False)
    given = code.format(root=str(Path(__file__).parents[2]), url=url, path=str(path))
    return subprocess.Popen(
        [sys.executable, "-c", given],
        env={**os.environ, "OUTBOX_TEST": "1", "OUTBOX_CRASH_AT": crash_at},
    )


def numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("point", ["relay.read", "relay.sent", "relay.confirmed", "relay.stored"])
def test_a_relay_killed_at_any_point_loses_nothing(
    migrated_engine: Engine, tmp_path: Path, point: str
) -> None:
    publish(migrated_engine, *range(40))
    path = tmp_path / "sent"
    assert spawn(migrated_engine, path, f"{point}:1").wait(30) == -signal.SIGKILL
    publish(migrated_engine, *range(40, 50))
    bus = MemoryBus()
    with running(migrated_engine, bus):
        until(lambda: set(numbers(path)) | set(bus.taken) == set(range(50)))
    if point == "relay.stored":
        assert not set(numbers(path)) & set(bus.taken)


@pytest.mark.parametrize(
    "point", ["relay.asked:1", "relay.asked:3", "relay.read:3", "relay.sent:3", "relay.confirmed:2"]
)
def test_a_relay_killed_while_it_reads_ahead_loses_nothing_and_keeps_the_order_of_a_key(
    migrated_engine: Engine, tmp_path: Path, point: str
) -> None:
    count = 12_000
    publish(migrated_engine, *range(count))
    path = tmp_path / "sent"
    assert spawn(migrated_engine, path, point).wait(30) == -signal.SIGKILL
    bus = MemoryBus()
    with running(migrated_engine, bus):
        until(lambda: set(numbers(path)) | set(bus.taken) == set(range(count)))
    assert len(numbers(path)) < count
    for taken in (numbers(path), bus.taken):
        for key in range(7):
            of_key = [number for number in taken if number % 7 == key]
            assert of_key == sorted(of_key)


def test_lanes_of_a_killed_relay_are_taken_over_within_five_seconds(
    migrated_engine: Engine, tmp_path: Path
) -> None:
    bus = MemoryBus()
    victim = spawn(migrated_engine, tmp_path / "sent")
    try:
        with running(migrated_engine, bus) as survivor:
            until(lambda: len(survivor._held()) == 8)
            victim.kill()
            began = time.monotonic()
            publish(migrated_engine, *range(40))
            until(lambda: set(numbers(tmp_path / "sent")) | set(bus.taken) == set(range(40)))
            assert time.monotonic() - began < 5
    finally:
        victim.kill()
        victim.wait()


def test_a_relay_that_was_paused_cannot_move_a_cursor_that_is_no_longer_its_own(
    migrated_engine: Engine,
) -> None:
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        paused, other = Leases(connection), Leases(connection)
        paused.beat()
        held = dict(paused.held)
        assert len(held) == 16
        connection.execute(
            "UPDATE outbox.outbox_heartbeat SET expires_at = now() - interval '1 second'"
        )
        other.beat()
        assert len(other.held) == 16
        snapshot = Snapshot("100:100:")
        CursorStore(connection).store(Cursor({3: 50}, snapshot), other.held)
        with pytest.raises(LeaseLost):
            CursorStore(connection).store(Cursor({3: 7}, snapshot), held)
        # Even a row that slips in beside the fence is older than any of the new epoch.
        connection.execute(
            "INSERT INTO outbox.outbox_cursor (slot, lane, epoch, seq, hi, snapshot) "
            "VALUES (0, 3, %s, 999, 7, '100:100:')",
            (held[3],),
        )
        assert CursorStore(connection).load([3])[0].his == {3: 50}


def test_a_relay_whose_server_is_replaced_behind_a_pooler_begins_again_from_what_is_stored(
    migrated_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, check, replaced = MemoryBus(), Relay._check, iter(["1.5"])
    monkeypatch.setattr(
        Relay, "_check", lambda self, connection: next(replaced, "") or check(self, connection)
    )
    publish(migrated_engine, *range(5))
    with running(migrated_engine, bus) as relay:
        bus.await_numbers(set(range(5)))
        assert relay.stats.failures == 1


def test_where_another_server_answers_neither_cursors_nor_rolls_are_stored(
    migrated_engine: Engine,
) -> None:
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        leases = Leases(connection)
        leases.beat()
        cursor = Cursor({3: 50}, Snapshot("100:100:"))
        with pytest.raises(LeaseLost):
            CursorStore(connection, server="1.5").store(cursor, leases.held)
        assert CursorStore(connection).load([3])[0].his == {3: 0}
        RollCaller(connection, server="1.5").load([cursor], leases.held)
        assert connection.execute("SELECT FROM outbox.outbox_roll").fetchall() == []
        RollCaller(connection).load([cursor], leases.held)
        assert len(connection.execute("SELECT FROM outbox.outbox_roll").fetchall()) == 1


def test_stored_cursors_move_between_tables_that_are_emptied_in_turn(
    migrated_engine: Engine,
) -> None:
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        leases = Leases(connection)
        leases.beat()
        store = CursorStore(connection)
        for position in range(1, 400):
            store.store(Cursor({0: position, 1: position}, Snapshot("100:100:")), leases.held)
            store.rotate(when_over=20)
        (rows,) = connection.execute("SELECT count(*) FROM outbox.outbox_cursor").fetchone() or (0,)
        assert rows < 100
        assert CursorStore(connection).load([0, 1])[0].his == {0: 399, 1: 399}


def test_what_is_confirmed_is_stored_within_moments_also_after_everything_was(
    migrated_engine: Engine,
) -> None:
    """Everything is, now and then, whenever it was last: a relay that dies has no more sent again than before."""
    with (
        psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection,
        psycopg.connect(conninfo(migrated_engine), autocommit=True) as reading,
    ):
        leases = Leases(connection)
        leases.beat()
        pipeline = Pipeline(
            LogReader(reading), CursorStore(connection), MemoryBus(), None, RelayStats(),
            held=lambda: leases.held, rest=lambda _: None, page_rows=512, page_bytes=4_000_000, in_flight=16,
        )  # fmt: skip
        pipeline.follow_leases()
        pipeline.store_all()
        publish(migrated_engine, *range(20))

        def is_stored() -> bool:
            pipeline.turn()
            pipeline.store(time.monotonic())
            cursors = CursorStore(connection).load(range(16))
            return max(hi for cursor in cursors for hi in cursor.his.values()) == 20

        until(is_stored, 5)


def test_partitions_are_made_ahead_and_dropped_when_every_cursor_has_passed(
    migrated_engine: Engine,
) -> None:
    from datetime import timedelta

    bus = MemoryBus()
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        partitions = Partitions(connection, size=1_000_000, retention=timedelta(0))
        connection.execute("SELECT setval('outbox.outbox_event_position', 999990)")
        publish(migrated_engine, *range(20))
        connection.execute("SELECT setval('outbox.outbox_event_position', 2500000)")
        partitions.maintain()
        assert max(upper for _, upper in partitions._bounds().values()) > 2_500_000
        publish(migrated_engine, *range(20, 200))
        with running(migrated_engine, bus):
            bus.await_numbers(set(range(200)))
        assert "outbox_event_p000000000000" in partitions._bounds()
        partitions.maintain()
        assert "outbox_event_p000000000000" not in partitions._bounds()
        publish(migrated_engine, 200)


def test_partitions_are_made_while_there_is_always_more_to_send(migrated_engine: Engine) -> None:
    class Busy(MemoryBus):
        """Whatever is sent, another event is published."""

        is_busy = True

        def send(self, batch: Sequence[OutgoingMessage]) -> _Batch:
            if self.is_busy and batch:
                publish(migrated_engine, 0)
            return super().send(batch)

    bus = Busy()
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        partitions = Partitions(connection)
        before = partitions._bounds().keys()
        connection.execute("SELECT setval('outbox.outbox_event_position', 1500000)")
        publish(migrated_engine, 0)
        with running(migrated_engine, bus):
            try:
                until(lambda: bool(partitions._bounds().keys() - before), 30)
            finally:
                bus.is_busy = False


def test_a_log_restored_into_another_cluster_stops_the_relay_and_can_be_adopted(
    migrated_engine: Engine,
) -> None:
    first, second = MemoryBus(), MemoryBus()
    publish(migrated_engine, *range(30))
    with running(migrated_engine, first):
        first.await_numbers(set(range(30)))
    publish(migrated_engine, *range(30, 40))
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        # As after a restore: another cluster, and xids that are ahead of its counter.
        connection.execute("UPDATE outbox.outbox_cluster SET system_identifier = 1")
        connection.execute(
            "UPDATE outbox.outbox_event SET xid = (xid::text::bigint + 1000000)::text::xid8"
        )
        connection.execute(
            "UPDATE outbox.outbox_cursor SET snapshot = format('%s:%s:', x + 1000000, x + 1000000)::pg_snapshot, "
            "ceil = (ceil::text::bigint + 1000000)::text::xid8 "
            "FROM (SELECT pg_snapshot_xmax(snapshot)::text::bigint AS x, ctid AS id "
            "FROM outbox.outbox_cursor) AS c WHERE c.id = outbox_cursor.ctid"
        )
        with pytest.raises(ConfigurationError, match="adopt-cluster"):
            Relay(migrated_engine.url, MemoryBus()).run()
        adopt(connection)
        check_cluster(connection)
    with running(migrated_engine, second):
        second.await_numbers(set(range(30, 40)))
        publish(migrated_engine, 40)
        second.await_numbers({40})
    assert sorted(second.taken) == list(range(30, 41))
