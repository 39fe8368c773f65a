"""Ordered keys that have long been quiet: forgotten by handlers where no order is lost by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session

from outbox import ordering
from outbox.busy_keys import SPAN
from outbox.idle_keys import IDLE, forget
from outbox.ordering import SETTLE, Turn
from outbox.places import Place
from tests.local_servers import await_condition

WINDOW = timedelta(days=30)
LONG_AGO = timedelta(days=91)
KEYS = ("cold", "busy")


def place(key: str, seq: int) -> Place:
    return Place("books", "books.book", "shop", "order.moved", key, seq)


def turn(session: Session, key: str, seq: int) -> Turn:
    """Whether it is the number's turn; it is handled then."""
    when, _ = ordering.turn(session, place(key, seq))
    if when is Turn.NOW:
        ordering.move_on(session, place(key, seq))
    return when


def last_of(key: str) -> int:
    return SPAN + 3 if key == "busy" else 6


def run(engine: Engine, sql: str, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(text(sql), values)


def pass_time(engine: Engine, time: timedelta) -> None:
    for table in ("inbox_order", "inbox_busy_order"):
        run(engine, f"UPDATE outbox.{table} SET seen_at = seen_at - :time", time=time)


@pytest.fixture
def engine(migrated_engine: Engine) -> Engine:
    """With a cold and a busy key, both handled up to their last event."""
    run(migrated_engine, "UPDATE outbox.schema_version SET applied_at = now() - interval '1 year'")
    for key in KEYS:
        with Session(migrated_engine) as session, session.begin():
            for seq in range(1, last_of(key) + 1):
                assert turn(session, key, seq) is Turn.NOW
    return migrated_engine


def remembered(engine: Engine) -> Sequence[str]:
    tables = "SELECT key FROM outbox.inbox_order UNION ALL SELECT key FROM outbox.inbox_busy_order"
    with engine.connect() as connection:
        return connection.execute(text(f"{tables} ORDER BY key")).scalars().all()


def test_keys_are_forgotten_once_they_were_idle_for_long(engine: Engine) -> None:
    assert forget(engine, window=WINDOW, share=100) == 0
    pass_time(engine, IDLE - timedelta(days=1))
    assert forget(engine, window=WINDOW, share=100) == 0
    pass_time(engine, timedelta(days=2))
    assert forget(engine, window=2 * WINDOW, share=100) == 0, "not within twice the window"
    assert forget(engine, window=WINDOW, share=100) == 2
    assert remembered(engine) == []


def test_a_key_that_was_used_since_is_kept(engine: Engine) -> None:
    pass_time(engine, LONG_AGO)
    with Session(engine) as session, session.begin():
        assert turn(session, "busy", last_of("busy") + 1) is Turn.NOW
    assert forget(engine, window=WINDOW, share=100) == 1
    assert remembered(engine) == ["busy", "busy"]


def test_rows_from_before_their_moves_were_noted_are_kept_until_they_may_be_idle(
    engine: Engine,
) -> None:
    pass_time(engine, timedelta(days=1_000))
    run(engine, "UPDATE outbox.schema_version SET applied_at = now() - interval '1 day'")
    assert forget(engine, window=WINDOW, share=100) == 0


@pytest.mark.parametrize("key", KEYS)
def test_a_forgotten_key_goes_on_in_order_after_a_moment(engine: Engine, key: str) -> None:
    """And is not parked: its publisher goes on with its numbers, which the handler has forgotten."""
    pass_time(engine, LONG_AGO)
    forget(engine, window=WINDOW, share=100)
    first, second = last_of(key) + 1, last_of(key) + 2
    with Session(engine) as session, session.begin():
        assert ordering.turn(session, place(key, first)) == (Turn.EARLY, SETTLE)
        assert turn(session, key, second) is Turn.EARLY
    pass_time(engine, SETTLE)
    for seq, when in ((first, Turn.NOW), (first, Turn.LATE), (second, Turn.NOW)):
        with Session(engine) as session, session.begin():
            assert turn(session, key, seq) is when


def _is_owed(connection: Connection, key: str) -> None:
    connection.execute(
        text(
            "INSERT INTO outbox.pending_delivery (service, handler, event_id, reason, next_attempt_at, type, key, "
            "key_seq, body) VALUES ('books', 'books.book', gen_random_uuid(), 'early', now(), 'order.moved', :key, "
            "1000, '')"
        ),
        {"key": key},
    )


def _is_dead(connection: Connection, key: str) -> None:
    connection.execute(
        text(
            "INSERT INTO outbox.dead_letter (service, handler, event_id, type, key, key_seq, body, attempts, error, "
            "traceback) VALUES ('books', 'books.book', gen_random_uuid(), 'order.moved', :key, 1, '', 1, '', '')"
        ),
        {"key": key},
    )


def _is_quarantined(connection: Connection, _key: str) -> None:
    connection.execute(
        text(
            "INSERT INTO outbox.quarantine (service, digest, reason, headers, key_seq, body) "
            "VALUES ('books', '', '', '', 3, '')"
        )
    )


def _was_passed_over(connection: Connection, key: str) -> None:
    with Session(connection) as session:
        body = f'{{"source":"shop","type":"order.moved","partitionkey":"{key}","data":{{}}}}'
        ordering.pass_over(session, body.encode(), 1_000)
        session.commit()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("happens", [_is_owed, _is_dead, _is_quarantined, _was_passed_over])
def test_a_key_with_anything_that_may_still_be_handled_is_kept(
    engine: Engine, happens: Callable[[Connection, str], None], key: str
) -> None:
    with engine.begin() as connection:
        happens(connection, key)
    pass_time(engine, LONG_AGO)
    forget(engine, window=WINDOW, share=100)
    assert key in remembered(engine)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_being_handled_is_left_alone_and_handled_on(engine: Engine, key: str) -> None:
    pass_time(engine, LONG_AGO)
    with Session(engine) as session, session.begin():
        assert ordering.turn(session, place(key, last_of(key) + 1))[0] is Turn.NOW
        assert forget(engine, window=WINDOW, share=100) == 1, "the other one"
        ordering.move_on(session, place(key, last_of(key) + 1))
    assert key in remembered(engine)


def test_only_one_process_forgets_at_a_time(engine: Engine) -> None:
    pass_time(engine, LONG_AGO)
    with engine.begin() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(hashtext('outbox.inbox idle keys'))"))
        assert forget(engine, window=WINDOW, share=100) == 0
    assert forget(engine, window=WINDOW, share=100) == 2


def test_a_share_of_the_table_is_looked_at_each_time_until_all_of_it_was(engine: Engine) -> None:
    run(
        engine,
        "INSERT INTO outbox.inbox_order (handler, source, type, key, next_seq) "
        "SELECT 'books.book', 'shop', 'order.moved', i::text, 2 FROM generate_series(1, 5000) AS i",
    )
    pass_time(engine, LONG_AGO)
    first = forget(engine, window=WINDOW)
    assert 0 <= first < 5_000

    def is_empty() -> bool:
        forget(engine, window=WINDOW, share=50)
        return not remembered(engine)

    await_condition(is_empty, within=30, what="nothing left")
