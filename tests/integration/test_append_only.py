"""The log is only added to: counted by PostgreSQL, over all that publishes, relays, replays and maintains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import psycopg
from pydantic import BaseModel
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import outbox
from outbox.events import Registry
from outbox.partitions import Partitions
from outbox.replaying import Replay, Selection
from outbox.rolls import Wanted, WantedEvent
from tests.integration.test_relay import MemoryBus, conninfo, running, until

registry = Registry()


@registry.event("thing.made", key="key", ordered=True)
@dataclass
class Made:
    number: int
    key: int


@registry.event("thing.noted")
class Noted(BaseModel):
    number: int


def publish(engine: Engine, numbers: range) -> None:
    for number in numbers:
        with Session(engine) as session, session.begin():
            outbox.publish(session, Made(number, number % 7), registry=registry)
            outbox.publish(session, Noted(number=number), registry=registry)


@dataclass
class Touched:
    """What was done to the rows of the log since it was made."""

    inserted: int
    updated: int
    deleted: int


def touched(engine: Engine) -> Touched:
    with engine.connect() as connection:
        row = connection.execute(
            text(
                "SELECT sum(n_tup_ins), sum(n_tup_upd), sum(n_tup_del) FROM pg_stat_user_tables "
                "WHERE schemaname = 'outbox' AND relname LIKE 'outbox_event%'"
            )
        ).one()
    return Touched(*map(int, row))


def test_no_event_is_updated_or_deleted_by_whatever_runs(
    migrated_engine: Engine, make_engine: Callable[..., Engine]
) -> None:
    bus, url = MemoryBus(), migrated_engine.url.render_as_string(hide_password=False)
    writers = make_engine(url)
    late = Session(writers)
    with late.begin_nested():
        outbox.publish(late, Noted(number=100), registry=registry)
    with running(migrated_engine, bus, rolls=timedelta(milliseconds=50)):
        publish(writers, range(20))
        bus.await_numbers(set(range(20)))
        late.commit()
        bus.await_numbers({100})
        with Session(writers) as session, session.begin():
            ask_again_for_all(session)
        until(lambda: bus.taken.count(7) == 4 and bus.taken.count(100) == 2)
        until(lambda: count(writers, "outbox_roll") > 16)
        until(lambda: count(writers, "replay_request") == 0)
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        for _ in Replay(connection, Selection(("thing.made",))).send(bus, "billing.events"):
            pass
        assert bus.taken.count(7) == 5
        connection.execute("SELECT setval('outbox.outbox_event_position', 1500000)")
        Partitions(connection).maintain()
        publish(writers, range(20, 30))
    # A session's counts are there for all to see when it has ended.
    late.close()
    writers.dispose()
    migrated_engine.dispose()
    until(lambda: touched(migrated_engine).inserted == 61)
    assert touched(migrated_engine) == Touched(inserted=61, updated=0, deleted=0)

    with running(migrated_engine, bus):
        bus.await_numbers(set(range(30)))
    with psycopg.connect(conninfo(migrated_engine), autocommit=True) as connection:
        partitions = Partitions(connection, retention=timedelta(0))
        partitions.maintain()
        assert "outbox_event_p000000000000" not in partitions._bounds()
    migrated_engine.dispose()
    until(lambda: touched(migrated_engine).inserted == 20)
    assert touched(migrated_engine) == Touched(inserted=20, updated=0, deleted=0)


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text(f"SELECT count(*) FROM outbox.{table}")) or 0)


def ask_again_for_all(session: Session) -> None:
    """As a subscriber that has got nothing."""
    rows = session.execute(
        text("SELECT event_id AS id, lane, position FROM outbox.outbox_event")
    ).all()
    wanted = Wanted(events=tuple(WantedEvent(**row._mapping) for row in rows))
    session.execute(
        text(
            "INSERT INTO outbox.replay_request (queue, wanted) VALUES ('billing.events', :wanted)"
        ),
        {"wanted": wanted.model_dump_json()},
    )
