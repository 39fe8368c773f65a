"""A savepoint that is moved: it takes back what came since, and nothing that was there before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import outbox
from outbox.events import Registry
from outbox.savepoints import Savepoint

registry = Registry()


@registry.event("note.taken", key="number")
@dataclass(frozen=True)
class Taken:
    number: int


@registry.event("note.counted", key="of", ordered=True)
@dataclass(frozen=True)
class Counted:
    number: int
    of: str = "all"


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    number: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def session(migrated_engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(migrated_engine)
    with Session(migrated_engine) as opened:
        yield opened


def work(session: Session, number: int, kind: type[Any] = Taken) -> None:
    """A row and an event, each in the way that is most usual."""
    session.add(Note(number=number))
    outbox.publish(session, kind(number), registry=registry)


def committed(session: Session) -> tuple[list[int], list[int]]:
    """Numbers of rows and of events, after a commit."""
    session.commit()
    rows = session.scalars(text("SELECT number FROM note ORDER BY number")).all()
    events = session.scalars(
        text(
            "SELECT (convert_from(body, 'UTF8')::json -> 'data' ->> 'number')::int AS number"
            " FROM outbox.outbox_event ORDER BY number"
        )
    ).all()
    return list(rows), list(events)


def test_what_came_since_is_taken_back_and_what_was_before_stays(session: Session) -> None:
    place = Savepoint(session)
    work(session, 1)
    place.move_here()
    work(session, 2)
    session.flush()
    session.execute(text("INSERT INTO note VALUES (3)"))
    outbox.publish(session.connection(), Taken(3), registry=registry)
    work(session, 4)

    assert place.take_back()

    work(session, 5)
    assert committed(session) == ([1, 5], [1, 5])


def test_it_is_moved_and_taken_back_again_and_again(session: Session) -> None:
    place = Savepoint(session)
    for number in range(10):
        place.move_here()
        work(session, number)
        if number % 3 == 0:
            assert place.take_back()
            assert place.take_back(), "to the same place"
    kept = [number for number in range(10) if number % 3]
    assert committed(session) == (kept, kept)


def test_numbers_of_an_ordered_key_have_no_gap_for_what_was_taken_back(session: Session) -> None:
    place = Savepoint(session)
    work(session, 1, Counted)
    place.move_here()
    outbox.publish(session.connection(), Counted(2), registry=registry)
    work(session, 3, Counted)
    assert place.take_back()
    work(session, 4, Counted)
    assert committed(session)[1] == [1, 4]
    numbers = session.scalars(text("SELECT key_seq FROM outbox.outbox_event ORDER BY key_seq"))
    assert numbers.all() == [1, 2]


def test_it_is_not_taken_back_once_events_from_before_were_written_since(session: Session) -> None:
    place = Savepoint(session)
    work(session, 1)
    place.move_here()
    with session.begin_nested():  # writes out what is held
        work(session, 2)

    assert not place.take_back()

    session.rollback()
    assert committed(session) == ([], [])


def test_savepoints_of_the_session_within_go_along(session: Session) -> None:
    place = Savepoint(session)
    place.move_here()
    work(session, 1)
    with session.begin_nested():
        work(session, 2)
    assert place.take_back()
    work(session, 3)
    assert committed(session) == ([3], [3])


def test_a_statement_that_failed_since_is_taken_back_too(session: Session) -> None:
    place = Savepoint(session)
    work(session, 1)
    place.move_here()
    with pytest.raises(DBAPIError):
        session.execute(text("SELECT 1 / 0"))
    assert place.take_back()
    assert committed(session) == ([1], [1])


def test_what_is_prepared_on_the_connection_outlives_it(session: Session) -> None:
    driver: Any = session.connection().connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    driver.prepare_threshold = 0
    session.execute(text("SELECT 42"))
    place = Savepoint(session)
    place.move_here()
    session.execute(text("SELECT 43"))
    assert place.take_back()
    prepared = session.scalars(text("SELECT statement FROM pg_prepared_statements")).all()
    assert {"SELECT 42", "SELECT 43"} <= set(prepared)
