"""The inbox by days: made ahead, forgotten beyond the window, and in nobody's way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox.ids import new_id
from outbox.inbox import Arrival, first_delivery
from outbox.inbox_partitions import day_bounds, maintain

WINDOW = timedelta(days=30)
TODAY = datetime.now(UTC).date()


def name(days: int) -> str:
    return f"inbox_p{TODAY + timedelta(days=days):%Y%m%d}"


def id_of(days: int) -> UUID:
    """An event id made that many days from now."""
    first, _ = day_bounds(TODAY + timedelta(days=days))
    return UUID(int=first.int | new_id().int & (2**80 - 1))


def enter(engine: Engine, event_id: UUID) -> Arrival:
    with Session(engine) as session, session.begin():
        return first_delivery(session, event_id, "h", b"digest")


def rows(engine: Engine, table: str) -> list[UUID]:
    with engine.connect() as connection:
        return list(connection.execute(text(f"SELECT event_id FROM outbox.{table}")).scalars())


def partitions(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        sql = "SELECT tablename FROM pg_tables WHERE tablename LIKE 'inbox_p%'"
        return set(connection.execute(text(sql)).scalars())


def test_the_days_to_come_get_partitions_once(migrated_engine: Engine) -> None:
    first = maintain(migrated_engine, window=WINDOW, days_ahead=2)
    second = maintain(migrated_engine, window=WINDOW, days_ahead=2)

    assert first.made == [name(0), name(1), name(2)]
    assert second.made == []


def test_an_event_of_today_goes_into_the_partition_of_today(migrated_engine: Engine) -> None:
    maintain(migrated_engine, window=WINDOW)
    event_id = new_id()

    enter(migrated_engine, event_id)

    assert rows(migrated_engine, name(0)) == [event_id]


def test_a_duplicate_is_known_after_its_row_has_moved(migrated_engine: Engine) -> None:
    early, other = id_of(1), id_of(20)
    enter(migrated_engine, early)
    enter(migrated_engine, other)
    assert set(rows(migrated_engine, "inbox_default")) == {early, other}

    maintain(migrated_engine, window=WINDOW)

    assert rows(migrated_engine, "inbox_default") == [other]
    assert enter(migrated_engine, early) is Arrival.DUPLICATE


def test_a_day_beyond_the_window_is_forgotten_and_one_within_is_not(
    migrated_engine: Engine,
) -> None:
    old, young = id_of(-32), id_of(-30)
    for days in (-32, -30):
        _make(migrated_engine, days)
    for event_id in (old, young):
        enter(migrated_engine, event_id)

    done = maintain(migrated_engine, window=WINDOW)

    assert (done.emptied, done.dropped) == ([name(-32)], [name(-32)])
    assert enter(migrated_engine, old) is Arrival.FIRST
    assert enter(migrated_engine, young) is Arrival.DUPLICATE


def test_forgetting_does_not_wait_for_a_handler_that_is_running(migrated_engine: Engine) -> None:
    _make(migrated_engine, -40)
    _make(migrated_engine, 0)
    enter(migrated_engine, id_of(-40))
    with Session(migrated_engine) as handler, handler.begin():
        first_delivery(handler, new_id(), "h", b"digest")
        done = maintain(migrated_engine, window=WINDOW, days_ahead=0)

    assert (done.emptied, done.dropped) == ([name(-40)], [])
    assert maintain(migrated_engine, window=WINDOW, days_ahead=0).dropped == [name(-40)]


def test_a_process_that_is_paused_with_the_locks_keeps_no_delivery_waiting(
    migrated_engine: Engine, make_engine: Callable[..., Engine]
) -> None:
    paused, go_on = threading.Event(), threading.Event()
    theirs = make_engine(migrated_engine.url)

    @event.listens_for(theirs, "before_cursor_execute")
    def pause(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("ALTER TABLE"):
            paused.set()
            go_on.wait(60)

    with ThreadPoolExecutor() as threads:
        upkeep = threads.submit(maintain, theirs, window=WINDOW)
        try:
            assert paused.wait(30)
            assert enter(migrated_engine, id_of(0)) is Arrival.FIRST
        finally:
            go_on.set()
        with pytest.raises(DBAPIError):
            upkeep.result()


def test_rows_outside_of_any_day_are_deleted_by_age(migrated_engine: Engine) -> None:
    no_uuid7 = UUID("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
    enter(migrated_engine, no_uuid7)
    with migrated_engine.begin() as connection:
        connection.execute(text("UPDATE outbox.inbox SET received_at = now() - interval '32 days'"))
    enter(migrated_engine, id_of(-100))

    done = maintain(migrated_engine, window=WINDOW)

    assert done.strays == 1
    assert len(rows(migrated_engine, "inbox_default")) == 1


def test_only_one_of_two_processes_does_the_work(migrated_engine: Engine) -> None:
    with migrated_engine.begin() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(hashtext('outbox.inbox partitions'))"))
        assert maintain(migrated_engine, window=WINDOW).made == []

    assert maintain(migrated_engine, window=WINDOW).made != []


@pytest.mark.parametrize("days", [0, 1, -400])
def test_ids_of_a_day_lie_within_its_bounds(days: int) -> None:
    first, end = day_bounds(TODAY + timedelta(days=days))

    assert first <= id_of(days) < end


def _make(engine: Engine, days: int) -> None:
    first, end = day_bounds(TODAY + timedelta(days=days))
    with engine.begin() as connection:
        connection.execute(
            text(
                f"CREATE TABLE outbox.{name(days)} PARTITION OF outbox.inbox "
                f"FOR VALUES FROM ('{first}') TO ('{end}')"
            )
        )
