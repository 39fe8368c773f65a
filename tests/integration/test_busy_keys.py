"""Ordered keys with many events: what they cost stays flat, and their numbers stay without gaps.

Buffers are counted while a transaction holds the xmin horizon, so that nothing that dies is cleared away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import psycopg
import pytest
from psycopg import errors
from sqlalchemy import Engine, make_url, text
from sqlalchemy.orm import Session

import outbox.schema
from outbox import counting, ordering, places
from outbox.busy_keys import SPAN, BusyKeys
from outbox.connections import executor
from outbox.counting import Counted, draw
from outbox.errors import SchemaError
from outbox.events import Registry
from outbox.ordering import Turn
from outbox.places import Place
from outbox.publishing import publish
from outbox.statements import _for_psycopg
from tests.plans import PLANS, explain

KEY = Counted("shop", "order.moved", "hot")
HANDLER = "books.book"
PLACES = (200, 5_000, 20_000)
"""Numbers of the key at which the cost is looked at."""
FLAT = 25
"""Buffers that are enough: two or three ways down an index, the pages of one span, and what the update writes."""
TYPES = {
    **dict.fromkeys(("handler", "source", "type", "key"), "text"),
    **dict.fromkeys(("next", "span", "next_span", "events"), "bigint"),
}
COUNT_BUSY = "SELECT outbox.count_busy_key(%(source)s, %(type)s, %(key)s, %(events)s)"
COUNT_AGAIN_AND_AGAIN = """
DO $$ BEGIN
    FOR i IN 1..{times} LOOP
        PERFORM outbox.count_busy_key('shop', 'order.moved', 'hot', 1);
        {end};
    END LOOP;
END $$
"""
STEP_AGAIN_AND_AGAIN = """
DO $$ BEGIN
    FOR i IN {first}..{last} LOOP
        PERFORM FROM outbox.inbox_busy_order WHERE handler = 'books.book' AND source = 'shop'
            AND type = 'order.moved' AND key = 'hot' ORDER BY span DESC LIMIT 1 FOR UPDATE;
        UPDATE outbox.inbox_busy_order SET next_seq = i + 1, span = (i + 1) / 100
        WHERE handler = 'books.book' AND source = 'shop' AND type = 'order.moved' AND key = 'hot'
            AND span = i / 100;
        COMMIT;
    END LOOP;
END $$
"""


@pytest.fixture
def connect(migrated_database_url: str) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    url = make_url(migrated_database_url).set(drivername="postgresql")
    opened: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        opened.append(psycopg.connect(url.render_as_string(hide_password=False)))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def connection(connect: Callable[[], psycopg.Connection[Any]]) -> psycopg.Connection[Any]:
    """In autocommit, beside a transaction that holds the horizon."""
    holder = connect()
    holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    holder.execute("SELECT pg_current_xact_id()")
    connection = connect()
    connection.autocommit = True
    connection.execute("SET synchronous_commit = off")
    return connection


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "BUSY", BusyKeys())
    monkeypatch.setattr(places, "BUSY", BusyKeys())


def count_up_to(connection: psycopg.Connection[Any], seq: int, key: Counted = KEY) -> None:
    with connection.transaction():
        assert draw(executor(connection), key, seq, "outbox") == seq


# ---- what they cost ----


@pytest.mark.parametrize("plan", PLANS)
def test_publishing_costs_the_same_however_many_events_of_the_key_were_published(
    connection: psycopg.Connection[Any], plan: str
) -> None:
    count_up_to(connection, SPAN)
    connection.execute("VACUUM ANALYZE outbox.outbox_busy_key")  # now it is known to be tiny
    given = {**KEY._asdict(), "events": 1}
    costs: list[int] = []
    for seq in PLACES:
        row = connection.execute("SELECT seq FROM outbox.outbox_busy_key").fetchone()
        assert row is not None
        left = seq - row[0]
        connection.execute(COUNT_AGAIN_AND_AGAIN.format(times=left, end="COMMIT").encode())
        explain(connection, COUNT_BUSY, given, TYPES, plan)  # the session learns the function
        costs.append(explain(connection, COUNT_BUSY, given, TYPES, plan).buffers)
    assert max(costs) <= FLAT, costs


def test_one_row_that_is_looked_up_by_its_key_would_cost_more_with_every_event(
    connection: psycopg.Connection[Any],
) -> None:
    """What the tests of cost would say of the counter as it was."""
    update = (
        "INSERT INTO outbox.outbox_key (source, type, key, seq) VALUES ('shop', 'order.moved', 'hot', 1) "
        "ON CONFLICT (source, type, key) DO UPDATE SET seq = outbox_key.seq + EXCLUDED.seq"
    )
    loop = f"DO $$ BEGIN FOR i IN 1..5000 LOOP {update}; COMMIT; END LOOP; END $$"
    connection.execute(loop.encode())
    assert explain(connection, update, {}, {}, PLANS[0]).buffers > FLAT


@pytest.mark.parametrize("plan", PLANS)
def test_what_was_rolled_back_above_the_newest_number_is_not_looked_through(
    connection: psycopg.Connection[Any], plan: str
) -> None:
    count_up_to(connection, SPAN)
    with pytest.raises(errors.DivisionByZero):
        connection.execute(
            COUNT_AGAIN_AND_AGAIN.format(
                times=10_000, end="IF i = 10000 THEN PERFORM 1/0; END IF"
            ).encode()
        )
    for _ in range(300):
        with connection.transaction(force_rollback=True):
            draw(executor(connection), KEY, SPAN, "outbox")
    given = {**KEY._asdict(), "events": 1}
    explain(connection, COUNT_BUSY, given, TYPES, plan)  # marks the entries that nobody can need
    explain(connection, COUNT_BUSY, given, TYPES, plan)
    assert explain(connection, COUNT_BUSY, given, TYPES, plan).buffers <= FLAT


@pytest.mark.parametrize("plan", PLANS)
def test_receiving_costs_the_same_however_many_events_of_the_key_were_handled(
    connection: psycopg.Connection[Any], plan: str
) -> None:
    key = {"handler": HANDLER, **KEY._asdict()}
    connection.execute(
        "INSERT INTO outbox.inbox_order (handler, source, type, key, next_seq) "
        "VALUES (%(handler)s, %(source)s, %(type)s, %(key)s, 0)",
        key,
    )
    connection.execute(
        "INSERT INTO outbox.inbox_busy_order (handler, source, type, key, span, next_seq) "
        "VALUES (%(handler)s, %(source)s, %(type)s, %(key)s, 1, 100)",
        key,
    )
    costs: list[tuple[int, int]] = []
    at = SPAN
    for seq in PLACES:
        connection.execute(STEP_AGAIN_AND_AGAIN.format(first=at, last=seq - 1).encode())
        at = seq
        given = {**key, "span": seq // SPAN, "next": seq + 1, "next_span": (seq + 1) // SPAN}
        asked = [
            _for_psycopg(one, "outbox").decode() for one in (places._LOCK_BUSY, places._STEP_BUSY)
        ]
        with connection.transaction(force_rollback=True):
            lock, step = (explain(connection, sql, given, TYPES, plan) for sql in asked)
        assert (lock.rows, step.rows) == (1, 1)
        costs.append((lock.buffers, step.buffers))
    assert max(max(costs)) <= FLAT, costs


# ---- numbers ----


@dataclass(frozen=True)
class Moved:
    account: str


registry = Registry()
registry.event("money.moved", key="account", ordered=True)(Moved)


class _PerThread(threading.local):
    """As if each thread were a process."""

    def __init__(self) -> None:
        self.keys = BusyKeys()

    def __contains__(self, key: Any) -> bool:
        return key in self.keys

    def add(self, key: Any) -> None:
        self.keys.add(key)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_many_writers_of_one_key_leave_no_gap_and_number_in_the_order_of_commits(
    connect: Callable[[], psycopg.Connection[Any]],
    monkeypatch: pytest.MonkeyPatch,
    isolation: str,
) -> None:
    hints = _PerThread()
    monkeypatch.setattr(counting, "BUSY", hints)

    def write(connection: psycopg.Connection[Any]) -> int:
        random, committed = Random(id(connection)), 0
        setting = f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {isolation}"
        connection.execute(setting.encode())
        connection.commit()
        while committed < 40:
            if random.random() < 0.2:
                hints.keys = BusyKeys()  # a new process
            events = [Moved("a")] * random.choice((1, 1, 3, 2 * SPAN))
            try:
                for event in events[:3]:
                    publish(connection, event, registry=registry)
                if random.random() < 0.3:
                    with connection.transaction(force_rollback=True):
                        draw(
                            executor(connection),
                            Counted("money", "money.moved", "a"),
                            len(events),
                            "outbox",
                        )
                if random.random() < 0.3:
                    connection.rollback()
                    continue
                connection.commit()
                committed += 1
            except errors.SerializationFailure:
                connection.rollback()
        return committed

    writers = [connect() for _ in range(6)]
    with ThreadPoolExecutor(len(writers)) as pool:
        assert sum(pool.map(write, writers)) == 40 * len(writers)
    rows = connect().execute("SELECT key_seq FROM outbox.outbox_event ORDER BY position").fetchall()
    numbers = [row[0] for row in rows]
    assert len(numbers) > 2 * SPAN
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("counted", [SPAN - 1, SPAN + 1], ids=["before it moves", "after"])
def test_a_writer_whose_snapshot_is_older_than_the_newest_number_is_refused(
    connect: Callable[[], psycopg.Connection[Any]], counted: int
) -> None:
    count_up_to(connect(), counted)
    old = connect()
    old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT 1")
    other = connect()
    assert draw(executor(other), KEY, 5 * SPAN, "outbox") == counted + 5 * SPAN
    other.commit()
    with pytest.raises(errors.SerializationFailure):
        draw(executor(old), KEY, 1, "outbox")


def test_serializable_writers_of_different_busy_keys_leave_each_other_alone(
    connect: Callable[[], psycopg.Connection[Any]],
) -> None:
    one, other, maintenance = connect(), connect(), connect()
    maintenance.autocommit = True
    for connection, key in ((one, KEY), (other, KEY._replace(key="another"))):
        count_up_to(connection, SPAN, key)
    maintenance.execute("VACUUM ANALYZE outbox.outbox_busy_key")  # now it is known to be tiny
    for connection, key in ((one, KEY), (other, KEY._replace(key="another"))):
        connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        draw(executor(connection), key, 1, "outbox")
    one.commit()
    other.commit()


def test_a_key_that_moves_in_what_is_rolled_back_goes_on_where_it_was(
    connect: Callable[[], psycopg.Connection[Any]],
) -> None:
    connection = connect()
    count_up_to(connection, SPAN - 1)
    with connection.transaction():
        with connection.transaction(force_rollback=True):
            assert draw(executor(connection), KEY, 3, "outbox") == SPAN + 2
        assert draw(executor(connection), KEY, 1, "outbox") == SPAN
    with connection.transaction(force_rollback=True):
        assert draw(executor(connection), KEY, 1, "outbox") == SPAN + 1
    assert draw(executor(connection), KEY, 1, "outbox") == SPAN + 1


def test_a_busy_key_is_one_round_trip_once_this_process_knows_it(
    connect: Callable[[], psycopg.Connection[Any]],
) -> None:
    count_up_to(connect(), SPAN)
    counting.BUSY.forget()
    connection = connect()
    asked: list[str] = []

    def execute(sql: str, params: Any, returns: bool) -> Any:
        asked.append(sql)
        return executor(connection)(sql, params, returns)

    draw(execute, KEY, 1, "outbox")
    assert len(asked) == 2
    draw(execute, KEY, 1, "outbox")
    draw(execute, KEY._replace(key="cold"), 1, "outbox")
    assert len(asked) == 4


def test_a_counter_that_was_deleted_is_said_and_not_begun_again(
    connect: Callable[[], psycopg.Connection[Any]],
) -> None:
    connection = connect()
    count_up_to(connection, SPAN)
    connection.execute("TRUNCATE outbox.outbox_busy_key")
    with pytest.raises(SchemaError, match="'hot'"):
        draw(executor(connection), KEY, 1, "outbox")


def test_the_database_has_the_spans_of_this_release(migrated_engine: Engine) -> None:
    """A span that went down would take the newest row out of sight."""
    with migrated_engine.connect() as connection:
        defined = connection.scalar(
            text("SELECT pg_get_functiondef('outbox.count_busy_key'::regproc)")
        )
    assert f"span = (k.seq + events) / {SPAN}\n" in defined


def test_keys_that_were_used_lately_are_remembered() -> None:
    keys = BusyKeys(remembered=2)
    for key in "abcdef":
        keys.add(key)
        assert "a" in keys or key > "d"
        assert "a" in keys
    assert "b" not in keys


class _Overtaken(set[Hashable]):
    """While its size is looked at, another thread adds a key."""

    def __init__(self, of: BusyKeys, keys: Iterable[str]) -> None:
        super().__init__(keys)
        self._overtake: Callable[[], None] | None = lambda: of.add("overtaking")

    def __len__(self) -> int:
        overtake, self._overtake = self._overtake, None
        if overtake is not None:
            overtake()
        return super().__len__()


def test_no_key_is_lost_where_two_threads_come_upon_a_full_set() -> None:
    keys = BusyKeys(remembered=3)
    keys._newer = _Overtaken(keys, ("a", "b", "c"))
    keys.add("d")
    assert {"a", "b", "c", "d", "overtaking"} <= keys._newer | keys._older


# ---- handlers ----


def turn(engine: Engine, seq: int) -> Turn:
    """Whether it is the number's turn; it is handled then."""
    place = Place("books", HANDLER, *KEY, seq)
    with Session(engine) as session, session.begin():
        when, _ = ordering.turn(session, place)
        if when is Turn.NOW:
            ordering.move_on(session, place)
        return when


def test_handlers_go_on_in_order_when_a_key_gets_busy(migrated_engine: Engine) -> None:
    for seq in range(1, 3 * SPAN):
        assert turn(migrated_engine, seq + 1) is Turn.EARLY
        assert turn(migrated_engine, seq) is Turn.NOW
        assert turn(migrated_engine, seq) is Turn.LATE
        if seq % 50 == 0:
            places.BUSY.forget()  # another worker


def test_what_is_passed_over_of_a_busy_key_is_skipped_in_its_turn(migrated_engine: Engine) -> None:
    for seq in range(1, SPAN + 5):
        assert turn(migrated_engine, seq) is Turn.NOW
    body = b'{"source":"shop","type":"order.moved","partitionkey":"hot","data":{}}'
    with Session(migrated_engine) as session, session.begin():
        for seq in (SPAN + 6, SPAN + 7, 2 * SPAN):
            ordering.pass_over(session, body, seq)
    assert turn(migrated_engine, SPAN + 5) is Turn.NOW
    assert turn(migrated_engine, SPAN + 6) is Turn.LATE
    assert turn(migrated_engine, SPAN + 8) is Turn.NOW
    with Session(migrated_engine) as session, session.begin():
        ordering.pass_over(session, body, SPAN + 9)
    assert turn(migrated_engine, SPAN + 10) is Turn.NOW


def test_workers_at_one_busy_key_take_turns(migrated_engine: Engine) -> None:
    last = SPAN + 60
    handled: list[int] = []

    def work(seed: int) -> None:
        random = Random(seed)
        while len(handled) < last:
            seq = len(handled) + random.choice((1, 1, 2))
            if turn(migrated_engine, seq) is Turn.NOW:
                handled.append(seq)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(handled)[:last] == list(range(1, last + 1))
    assert len(set(handled)) == len(handled)


# ---- from version 1 and back ----


def test_keys_of_version_1_go_on_where_they_were_and_back(engine: Engine) -> None:
    outbox.schema.upgrade_engine(engine, to=1)
    with engine.begin() as connection:
        for key, seq in (("hot", 5_000), ("cold", 7)):
            named = {"key": key, "seq": seq}
            connection.execute(
                text("INSERT INTO outbox.outbox_key VALUES ('shop', 'order.moved', :key, :seq)"),
                named,
            )
            connection.execute(
                text(
                    "INSERT INTO outbox.inbox_order (handler, source, type, key, next_seq, passed) "
                    "VALUES ('books.book', 'shop', 'order.moved', :key, :seq, ARRAY[:seq + 1])"
                ),
                named,
            )
    outbox.schema.upgrade_engine(engine)
    with engine.begin() as connection:
        execute = executor(connection)
        assert [draw(execute, KEY, 2, "outbox") for _ in range(2)] == [5_002, 5_004]
        assert draw(execute, KEY._replace(key="cold"), 1, "outbox") == 8
    assert turn(engine, 5_000) is Turn.NOW
    assert turn(engine, 5_002) is Turn.NOW
    outbox.schema.downgrade_engine(engine, to=1)
    with engine.connect() as connection:
        counted = connection.execute(text("SELECT key, seq FROM outbox.outbox_key ORDER BY key"))
        assert [tuple(row) for row in counted] == [("cold", 8), ("hot", 5_004)]
        order = connection.execute(text("SELECT next_seq FROM outbox.inbox_order ORDER BY key"))
        assert list(order.scalars()) == [7, 5_003]


@pytest.fixture
def role(engine: Engine, unique_name: str) -> Iterator[str]:
    """May use the schema, and what tests let it use beyond that."""
    outbox.schema.upgrade_engine(engine, to=1)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {unique_name}"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA outbox TO {unique_name}"))
    yield unique_name
    with engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {unique_name}"))
        connection.execute(text(f"DROP ROLE {unique_name}"))


def publishes_to_a_busy_key(engine: Engine, role: str) -> None:
    with engine.connect() as connection:
        connection.execute(text(f"SET ROLE {role}"))
        assert [draw(executor(connection), KEY, SPAN, "outbox") for _ in "12"] == [SPAN, 2 * SPAN]


@pytest.mark.parametrize("functions_are_for", ["everybody", "nobody"])
def test_who_could_publish_before_the_migration_can_publish_to_a_busy_key(
    engine: Engine, role: str, functions_are_for: str
) -> None:
    with engine.begin() as connection:
        may = f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA outbox TO {role}"
        connection.execute(text(may))
        if functions_are_for == "nobody":
            connection.execute(
                text("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
            )
    outbox.schema.upgrade_engine(engine)
    publishes_to_a_busy_key(engine, role)


def test_the_owner_can_publish_to_a_busy_key_though_another_role_has_migrated(
    engine: Engine, role: str
) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE outbox.outbox_key OWNER TO {role}"))
    outbox.schema.upgrade_engine(engine)
    publishes_to_a_busy_key(engine, role)


def test_a_publisher_and_a_worker_of_version_1_do_no_harm_to_a_busy_key(
    migrated_engine: Engine, connect: Callable[[], psycopg.Connection[Any]]
) -> None:
    """While a deployment rolls: the publisher gets no number, and fails; the worker finds nothing's turn come."""
    connection = connect()
    count_up_to(connection, SPAN)
    counted = connection.execute(
        "INSERT INTO outbox.outbox_key (source, type, key, seq) VALUES (%s, %s, %s, 1) "
        "ON CONFLICT (source, type, key) DO UPDATE SET seq = outbox_key.seq + EXCLUDED.seq RETURNING seq",
        KEY,
    )
    assert counted.fetchone() == (None,)
    connection.rollback()
    for seq in range(1, SPAN + 1):
        turn(migrated_engine, seq)
    row = connection.execute("SELECT next_seq, passed FROM outbox.inbox_order").fetchone()
    assert row == (0, [])
