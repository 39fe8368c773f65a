"""A step that rejects in a batch takes back what it did, whatever that was, and nothing of the steps beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import outbox
from outbox.events import Registry
from outbox.intake import Incoming
from outbox.receive import Receiver
from saga import Participant, Reject, operating
from saga.errors import Refused as UnknownHere
from saga.operating import Operator

Doing = Callable[["Desk", Session, str], None]


@dataclass(frozen=True)
class Asked:
    name: str
    refused: bool


@dataclass(frozen=True)
class Granted:
    name: str


@dataclass(frozen=True)
class Refused:
    name: str


@dataclass(frozen=True)
class Noted:
    name: str


@dataclass(frozen=True)
class Opened:
    name: str


class Desk:
    """One participant, whose only step writes, publishes and does what a test says before it rejects."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.doing: Doing = nothing
        self.registry = Registry()
        for kind in (Asked, Granted, Refused, Noted, Opened):
            self.registry.event(f"desk.{kind.__name__.lower()}", key="name")(kind)
        self.desk = Participant("desk", registry=self.registry)
        self.shop = Participant("shop", registry=self.registry)
        self.shop.starts(Asked, nothing_to_undo="it is a test")
        self.started: dict[str, UUID] = {}
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE desk_row (name text PRIMARY KEY)"))
        self._declare()

    def _declare(self) -> None:
        @self.desk.step(on=Asked, emits=Granted, rejects=Refused)
        def decide(asked: Asked, session: Session) -> Granted:
            write(session, asked.name)
            outbox.publish(session, Noted(asked.name), registry=self.registry)
            if asked.refused:
                self.doing(self, session, asked.name)
                raise Reject(Refused(asked.name))
            return Granted(asked.name)

        @decide.compensation
        def undo(asked: Asked, granted: Granted, session: Session) -> None: ...

        @self.desk.compensation(Opened)
        def close(opened: Opened, session: Session) -> None: ...

        @self.desk.deadline(minutes=5, rejects=Refused)
        def expire(opened: Opened, session: Session) -> Refused:
            return Refused(opened.name)

    def take_in(self, granted: str, refused: str) -> None:
        """Start a saga for each letter and hand all of them to the step, as one batch in the order of their ids."""
        batch = []
        for name in granted + refused:
            with Session(self.engine) as session, session.begin():
                saga_id = self.shop.start(session, Asked(name, refused=name in refused))
                self.started[name] = saga_id
                found = text("SELECT trigger FROM outbox.saga_step WHERE saga_id = :id")
                batch.append(Incoming(bytes(session.scalars(found, {"id": saga_id}).one())))
        Receiver(self.desk, self.engine).take_in_batch(batch)

    def written(self) -> str:
        return "".join(self.column("SELECT name FROM desk_row ORDER BY name"))

    def told(self, event: type[Any]) -> str:
        sql = (
            "SELECT convert_from(body, 'UTF8')::json -> 'data' ->> 'name' AS name FROM outbox.outbox_event"
            " WHERE type = :type ORDER BY name"
        )
        return "".join(self.column(sql, type=self.registry.of_class(event).name))

    def runs(self) -> dict[str, str]:
        names = {saga_id: name for name, saga_id in self.started.items()}
        with self.engine.connect() as connection:
            found = connection.execute(
                text("SELECT saga_id, state FROM outbox.saga_step WHERE step = 'decide'")
            )
            return {names[row.saga_id]: row.state for row in found}

    def column(self, sql: str, **values: object) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.scalars(text(sql), values))


def write(session: Session, name: str) -> None:
    session.execute(text("INSERT INTO desk_row VALUES (:name)"), {"name": name})


def nothing(desk: Desk, session: Session, name: str) -> None: ...


def publish_in_a_savepoint(desk: Desk, session: Session, name: str) -> None:
    with session.begin_nested():
        outbox.publish(session, Noted(f"{name}!"), registry=desk.registry)


def start_another_saga(desk: Desk, session: Session, name: str) -> None:
    desk.desk.start(session, Opened(name))


def abort_all_others(desk: Desk, session: Session, name: str) -> None:
    operator = Operator("the desk", "a whim")
    for other, saga_id in desk.started.items():
        if other != name:
            with suppress(UnknownHere):  # run alone, it may be the first
                operating.abort(session, saga_id, operator, participant="desk", force=True)


def fail_a_statement(desk: Desk, session: Session, name: str) -> None:
    with suppress(DBAPIError):
        write(session, name)


@pytest.fixture
def desk(migrated_engine: Engine) -> Desk:
    return Desk(migrated_engine)


@pytest.mark.parametrize(
    "doing",
    [nothing, publish_in_a_savepoint, start_another_saga, abort_all_others, fail_a_statement],
)
def test_what_a_rejecting_step_did_is_gone_and_what_others_did_is_there(
    desk: Desk, doing: Doing
) -> None:
    desk.doing = doing

    desk.take_in("ab", "cd")
    desk.take_in("ef", "")

    assert desk.written() == "abef"
    assert desk.told(Noted) == "abef"
    assert desk.told(Granted) == "abef"
    assert desk.told(Refused) == "cd"
    assert desk.told(Opened) == ""
    assert desk.column("SELECT handler FROM outbox.pending_delivery") == []
    assert desk.runs() == {**dict.fromkeys("abef", "done"), **dict.fromkeys("cd", "rejected")}
    states = desk.column("SELECT state FROM outbox.saga WHERE participant = 'desk' ORDER BY state")
    assert states == ["compensated", "compensated", "running", "running", "running", "running"]


def test_rejections_are_settled_in_the_transaction_of_their_batch(desk: Desk) -> None:
    desk.take_in("ab", "cd")

    for written_once in ("inbox", "saga_step WHERE step = 'decide'"):
        transactions = desk.column(f"SELECT DISTINCT xmin::text FROM outbox.{written_once}")
        assert len(transactions) == 1, written_once
