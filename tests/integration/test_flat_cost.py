"""What the relay asks costs what it delivers, not what lies behind it: counted in buffers, under both kinds of plans.

A transaction holds the xmin horizon throughout, so that nothing that dies is cleared away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from outbox.cursors import _NEWEST, CursorStore
from outbox.lanes import _HOLDERS, _LIVE, Leases
from outbox.partitions import Partitions
from outbox.reader import Cursor, LogReader
from outbox.roll_caller import _NAME, RollCaller, _Called, difference
from outbox.snapshot import Snapshot
from outbox.sql import in_schema
from tests.databases import Databases
from tests.plans import PLANS, Plan, explain

BEHIND = 200_000
FRESH = 160
LANES = list(range(16))
FILL = """
INSERT INTO outbox.outbox_event (lane, event_id, type, version, body)
SELECT mod(i, 16), gen_random_uuid(), 'thing.made', 1, convert_to(repeat('x', 300), 'UTF8')
FROM generate_series(1, %s) AS i
"""
TYPES = {
    "lanes": "smallint[]",
    "his": "bigint[]",
    "ends": "bigint[]",
    "rows": "bigint",
    "highest": "bigint",
    "running": "text[]",
    "next": "text",
    "ceiling": "text",
    "from_his": "bigint[]",
    "until": "text",
    "until_next": "text",
    "most": "bigint",
}


class Log:
    """A log with so many delivered events, and a horizon that is held from before the first one."""

    def __init__(self, url: str, behind: int) -> None:
        self._url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._open: list[psycopg.Connection[Any]] = []
        holder = self.connect(autocommit=False)
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT pg_current_xact_id()")
        self.connection = self.connect()
        # The delivered ones lie in two partitions, the fresh ones in the second.
        for start in (1, 1_000_000):
            self.connection.execute("SELECT setval('outbox.outbox_event_position', %s)", (start,))
            self.connection.execute(FILL, (max(behind // 2, 1),))
        self.connection.execute("ANALYZE outbox.outbox_event")
        self.cursor = self.read_to_the_end(Cursor.at_beginning(LANES))

    def connect(self, *, autocommit: bool = True) -> psycopg.Connection[Any]:
        self._open.append(psycopg.connect(self._url, autocommit=autocommit))
        return self._open[-1]

    def close(self) -> None:
        for connection in self._open:
            connection.close()

    def read_to_the_end(self, cursor: Cursor) -> Cursor:
        reader = LogReader(self.connection)
        while not (page := reader.read(cursor, 5_000)).complete:
            cursor = page.cursor
        return page.cursor

    def page(self, plan: str, rows: int = 500, *, reader: LogReader | None = None) -> Plan:
        """The plan of the reader's own statement as it was run for one page after the cursor."""
        reader = reader or LogReader(self.connection)
        given = reader._given(self.cursor, rows, reader._ends(self.cursor))
        return self.explain(reader._page_sql, given, plan)

    def explain(self, sql: str, given: dict[str, Any], plan: str) -> Plan:
        return explain(self.connection, sql, given, TYPES, plan)


@pytest.fixture(scope="module")
def logs(databases: Databases) -> Iterator[dict[str, Log]]:
    """One with five events behind, one with very many."""
    urls = [databases.create_migrated() for _ in range(2)]
    made = {
        name: Log(url, behind)
        for name, url, behind in zip(("few", "many"), urls, (5, BEHIND), strict=True)
    }
    yield made
    for log in made.values():
        log.close()
    for url in urls:
        databases.drop(url)


@contextmanager
def fresh_events(log: Log, count: int) -> Iterator[None]:
    log.connection.execute(FILL, (count,))
    yield
    log.cursor = log.read_to_the_end(log.cursor)


def buffers_for(rows: int) -> int:
    """A descent of the index or two for each lane, and as much for the stragglers; then a buffer a row at most."""
    return rows + 10 * len(LANES)


@pytest.mark.parametrize("plan", PLANS)
def test_a_page_costs_its_rows_however_many_lie_behind_it(logs: dict[str, Log], plan: str) -> None:
    for log in logs.values():
        with fresh_events(log, FRESH):
            page = log.page(plan)
        assert page.rows == FRESH + 1
        assert page.buffers < buffers_for(FRESH)
    assert page.scans == {"Index Scan"}
    assert page.thrown_away == 0


@pytest.mark.parametrize("plan", PLANS)
def test_a_page_costs_its_rows_however_many_are_still_to_be_read(
    databases: Databases, plan: str
) -> None:
    url = databases.create_migrated()
    log = Log(url, 5)
    partitions = Partitions(log.connection, "outbox")
    for start in range(2_000_000, 14_000_000, 1_000_000):
        log.connection.execute("SELECT setval('outbox.outbox_event_position', %s)", (start,))
        partitions.maintain()
        log.connection.execute(FILL, (10 * FRESH,))
    reader = LogReader(log.connection)
    log.cursor = reader.read(log.cursor, FRESH // len(LANES)).cursor
    page = log.page(plan, FRESH // len(LANES), reader=reader)
    assert page.rows == FRESH + 1
    assert page.buffers < buffers_for(FRESH)
    log.close()
    databases.drop(url)


@pytest.mark.parametrize("plan", PLANS)
def test_an_empty_page_costs_next_to_nothing_however_many_lie_behind_it(
    logs: dict[str, Log], plan: str
) -> None:
    for log in logs.values():
        page = log.page(plan)
        assert page.rows == 1
        assert page.buffers < buffers_for(0)
    assert page.scans == {"Index Scan"}
    assert page.thrown_away == 0


@pytest.mark.parametrize("plan", PLANS)
def test_a_page_right_after_a_late_commit_costs_its_rows_however_many_lie_behind_it(
    logs: dict[str, Log], plan: str
) -> None:
    for log, since in zip(logs.values(), (5, BEHIND), strict=True):
        late = log.connect(autocommit=False)
        late.execute(FILL, (3,))
        log.connection.execute(FILL, (since,))
        log.cursor = log.read_to_the_end(log.cursor)
        late.commit()
        with fresh_events(log, FRESH):
            page = log.page(plan)
        assert page.rows == FRESH + 3 + 1
        assert page.buffers < buffers_for(FRESH + 3)
    assert page.scans == {"Index Scan"}
    assert page.thrown_away == 0


@pytest.mark.parametrize("plan", PLANS)
def test_naming_what_was_delivered_costs_its_rows_however_many_lie_behind_it(
    logs: dict[str, Log], plan: str
) -> None:
    for log, since in zip(logs.values(), (5, BEHIND), strict=True):
        late = log.connect(autocommit=False)
        late.execute(FILL, (3,))
        log.connection.execute(FILL, (since,))
        earlier = log.cursor = log.read_to_the_end(log.cursor)
        late.commit()
        with fresh_events(log, FRESH):
            pass
        his = [(lane, hi, log.cursor.his[lane]) for lane, hi in earlier.his.items()]
        given = difference(his, earlier.snapshot, log.cursor.snapshot) | {"most": 1_000}
        named = log.explain(in_schema(_NAME, "outbox"), given, plan)
        assert named.buffers < buffers_for(FRESH + 3)
    assert named.thrown_away == 0


def test_late_events_of_other_lanes_push_none_of_this_lane_out_of_a_roll(
    logs: dict[str, Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit that keeps the look short counts the rows of all lanes."""
    monkeypatch.setattr("outbox.roll_caller._MOST_AT_ONCE", 5)
    log = logs["few"]
    late = log.connect(autocommit=False)
    late.execute(FILL, (20,))
    log.connection.execute(FILL, (1,))
    log.cursor = earlier = log.read_to_the_end(log.cursor)
    late.commit()
    log.cursor = log.read_to_the_end(log.cursor)
    for lane in LANES:
        caller = RollCaller(log.connection, every=timedelta(seconds=5))
        caller._called = {lane: _Called(1, earlier.his[lane], earlier.snapshot)}
        assert list(caller._name([lane], log.cursor)) == [(lane, "thing.made")]


def test_cursors_and_leases_do_not_rot_while_the_horizon_is_held(logs: dict[str, Log]) -> None:
    log = logs["few"]
    leases, store = Leases(log.connection), CursorStore(log.connection)
    questions = {
        "cursors": (in_schema(_NEWEST, "outbox"), {"lanes": LANES}),
        "live relays": (in_schema(_LIVE, "outbox"), {}),
        "holders": (in_schema(_HOLDERS, "outbox"), {}),
    }
    leases.beat()
    # As after hours: of cursors as they are stored, of four relays' beats, of a relay that starts again and again.
    for number in range(2_000):
        store.store(Cursor(dict.fromkeys(LANES, number), Snapshot("100:100:")), leases.held)
        if number % 100 == 0:
            store.rotate(when_over=10_000)
    log.connection.execute(
        "INSERT INTO outbox.outbox_heartbeat SELECT gen_random_uuid(), i, clock_timestamp() - interval '2 minutes', "
        "'h' FROM generate_series(1, 100000) AS i"
    )
    log.connection.execute(
        "INSERT INTO outbox.outbox_lease SELECT lane, newest + i, gen_random_uuid() FROM "
        "(SELECT lane, max(epoch) AS newest FROM outbox.outbox_lease GROUP BY lane) AS l, generate_series(1, 2000) AS i"
    )
    later = Leases(log.connection)
    later.beat()  # its first, which deletes what is old
    later.release()

    for plan in PLANS:
        for name, asked in questions.items():
            assert log.explain(*asked, plan).buffers < buffers_for(0), (name, plan)
    leases.release()
