"""Choreographies of other shapes: chains, work after the decision, several runs of one step, versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from outbox import publish
from outbox.envelope import decode
from outbox.events import Registry
from saga import Participant, Reject, current
from saga.testing.choreography import Choreography


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@dataclass(frozen=True)
class Opened:
    name: str


@dataclass(frozen=True)
class Drawn:
    name: str
    number: int = 0


@dataclass(frozen=True)
class Painted:
    name: str


@dataclass(frozen=True)
class Spoiled:
    name: str


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    for cls in (Opened, Drawn, Painted, Spoiled):
        registry.event(f"work.{cls.__name__.lower()}", key="name")(cls)
    return registry


Play = Callable[..., Choreography]


@pytest.fixture
def play(engine: Engine) -> Play:
    return lambda *participants: Choreography(dict.fromkeys(participants, engine))


def start(engine: Engine, participant: Participant, event: object) -> UUID:
    with Session(engine) as session, session.begin():
        return participant.start(session, event)


def states(engine: Engine, saga_id: UUID) -> dict[str, str]:
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT participant, state, stuck FROM outbox.saga WHERE saga_id = :id"),
            {"id": saga_id},
        )
        return {row.participant: row.state + (" stuck" if row.stuck else "") for row in rows}


def test_a_chain_whose_last_step_rejects_is_undone_up_to_its_start(
    engine: Engine, registry: Registry, play: Play
) -> None:
    done: list[str] = []
    opener, drawer, painter = (
        Participant(name, registry=registry) for name in ("opener", "drawer", "painter")
    )

    @opener.compensation(Opened)
    def close(opened: Opened, session: Session) -> None:
        done.append("close")

    @drawer.step(on=Opened, emits=Drawn)
    def draw(opened: Opened, session: Session) -> Drawn:
        done.append("draw")
        return Drawn(opened.name, 7)

    @draw.compensation
    def erase(opened: Opened, drawn: Drawn, session: Session) -> None:
        done.append(f"erase {drawn.number}")

    @painter.step(on=Drawn, emits=Painted, rejects=Spoiled)
    def paint(drawn: Drawn, session: Session) -> Painted:
        raise Reject(Spoiled(drawn.name))

    stage = play(opener, drawer, painter)
    saga_id = start(engine, opener, Opened("a"))
    stage.settle()
    assert set(states(engine, saga_id).values()) == {"compensated"}
    assert sorted(done) == ["close", "draw", "erase 7"]


@pytest.mark.parametrize("first", ["work.painted", "saga.completed"])
def test_a_step_after_the_decision_runs_whether_it_has_heard_of_the_decision_or_not(
    engine: Engine, registry: Registry, play: Play, first: str
) -> None:
    done: list[str] = []
    opener, packer = (
        Participant("opener", registry=registry),
        Participant("packer", registry=registry),
    )
    opener.starts(Opened, nothing_to_undo="a test")

    @opener.join(Opened, emits=Painted, completes=True)
    def decide(opened: Opened, session: Session) -> Painted:
        return Painted(opened.name)

    @packer.step(on=Painted, nothing_to_undo="it runs after the decision")
    def pack(painted: Painted, session: Session) -> None:
        done.append("pack")

    stage = play(opener, packer)
    saga_id = start(engine, opener, Opened("b"))
    stage.settle(lambda waiting: next((m for m in waiting if m.type == first), waiting[0]))
    assert done == ["pack"]
    assert set(states(engine, saga_id).values()) == {"completed"}


def test_a_join_may_reject_and_aborts_the_saga_that_it_would_have_completed(
    engine: Engine, registry: Registry, play: Play
) -> None:
    done: list[str] = []
    opener, drawer = (
        Participant("opener", registry=registry),
        Participant("drawer", registry=registry),
    )
    opener.starts(Opened, nothing_to_undo="a test")

    @drawer.step(on=Opened, emits=Drawn)
    def draw(opened: Opened, session: Session) -> Drawn:
        return Drawn(opened.name)

    @draw.compensation
    def erase(opened: Opened, drawn: Drawn, session: Session) -> None:
        done.append("erase")

    @opener.join(Drawn, rejects=Spoiled, completes=True)
    def decide(drawn: Drawn, session: Session) -> None:
        raise Reject(Spoiled(drawn.name))

    stage = play(opener, drawer)
    saga_id = start(engine, opener, Opened("c"))
    stage.settle()
    assert set(states(engine, saga_id).values()) == {"compensated"}
    assert done == ["erase"]


def test_a_step_runs_for_each_event_and_every_run_is_undone_with_its_own(
    engine: Engine, registry: Registry, play: Play
) -> None:
    done: list[int] = []
    undone: list[int] = []
    opener, painter = (
        Participant("opener", registry=registry),
        Participant("painter", registry=registry),
    )

    @opener.compensation(Opened)
    def close(opened: Opened, session: Session) -> None: ...

    @opener.step(on=Opened, nothing_to_undo="its events are what is undone")
    def draw(opened: Opened, session: Session) -> None:
        opener.publish_all(session, [Drawn(opened.name, 1), Drawn(opened.name, 2)])
        opener.publish(session, Drawn(opened.name, 3))

    @painter.step(on=Drawn, emits=Painted, rejects=Spoiled)
    def paint(drawn: Drawn, session: Session) -> Painted:
        if drawn.number == 3:
            raise Reject(Spoiled(drawn.name))
        done.append(drawn.number)
        return Painted(drawn.name)

    @paint.compensation
    def strip(drawn: Drawn, painted: Painted, session: Session) -> None:
        undone.append(drawn.number)

    stage = play(opener, painter)
    saga_id = start(engine, opener, Opened("d"))
    stage.settle()
    assert done == [1, 2]
    assert sorted(undone) == [1, 2]
    assert set(states(engine, saga_id).values()) == {"compensated"}
    drawn = [decode(one.body) for one in stage.delivered if one.type == "work.drawn"]
    assert {one.extensions["sagaid"] for one in drawn} == {str(saga_id)}
    assert {one.correlation_id for one in drawn} == {str(saga_id)}


def test_a_saga_started_by_a_step_is_its_own_and_says_what_caused_it(
    engine: Engine, registry: Registry, play: Play
) -> None:
    opener, drawer = (
        Participant("opener", registry=registry),
        Participant("drawer", registry=registry),
    )
    opener.starts(Opened, nothing_to_undo="a test")
    drawer.starts(Drawn, nothing_to_undo="a test")
    children: list[UUID] = []
    outer: list[Any] = []

    @drawer.step(on=Opened, nothing_to_undo="a test")
    def draw(opened: Opened, session: Session) -> None:
        outer.append(current())
        children.append(drawer.start(session, Drawn(opened.name)))

    @drawer.on(Drawn)
    def look(drawn: Drawn, session: Session) -> None: ...

    stage = play(opener, drawer)
    saga_id = start(engine, opener, Opened("e"))
    stage.settle()
    (child,), (saga,) = children, outer
    assert saga.saga_id == saga_id
    assert child != saga_id
    opened, drawn = (
        next(decode(m.body) for m in stage.delivered if m.type == type)
        for type in ("work.opened", "work.drawn")
    )
    assert drawn.extensions["sagaid"] == str(child)
    assert drawn.causation_id == opened.id


def test_a_compensation_gets_old_events_in_the_version_that_the_code_knows_now(
    engine: Engine, registry: Registry, play: Play
) -> None:
    opener, drawer = (
        Participant("opener", registry=registry),
        Participant("drawer", registry=registry),
    )
    opener.starts(Opened, nothing_to_undo="a test")

    @drawer.step(on=Opened)
    def draw(opened: Opened, session: Session) -> None: ...

    @draw.compensation
    def erase(opened: Any, session: Session) -> None: ...

    stage = play(opener, drawer)
    saga_id = start(engine, opener, Opened("f"))
    stage.settle()

    newer, undone = newer_release()
    painter = Participant("painter", registry=newer.registry)

    @painter.step(on=Drawn, rejects=Spoiled)
    def paint(drawn: Drawn, session: Session) -> None:
        raise Reject(Spoiled(drawn.name))

    stage = play(newer, painter)
    with Session(engine) as session, session.begin():
        publish(session, Drawn("f"), registry=newer.registry, extensions={"sagaid": str(saga_id)})
    stage.settle()
    assert undone == [("f", "unknown")]
    assert states(engine, saga_id)["drawer"] == "compensated"


def newer_release() -> tuple[Participant, list[tuple[str, str]]]:
    """The drawer of a later deployment, which knows `work.opened` in version 2 only."""
    registry = Registry()

    @registry.event("work.opened", version=2, key="name")
    @dataclass(frozen=True)
    class OpenedBy:
        name: str
        by: str

    @registry.upcast("work.opened", from_version=1)
    def add_who(data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "by": "unknown"}

    for cls in (Drawn, Spoiled):
        registry.event(f"work.{cls.__name__.lower()}", key="name")(cls)
    drawer = Participant("drawer", registry=registry)
    undone: list[tuple[str, str]] = []

    @drawer.step(on=OpenedBy)
    def draw(opened: OpenedBy, session: Session) -> None: ...

    @draw.compensation
    def erase(opened: OpenedBy, session: Session) -> None:
        undone.append((opened.name, opened.by))

    return drawer, undone


def test_a_saga_can_be_started_through_an_async_session(engine: Engine, registry: Registry) -> None:
    opener = Participant("opener", registry=registry)
    opener.starts(Opened, nothing_to_undo="a test")

    async def place() -> tuple[UUID, UUID]:
        async_engine = create_async_engine(engine.url)
        async with AsyncSession(async_engine) as session:
            kept = await opener.astart(session, Opened("g"))
            await session.commit()
            dropped = await opener.astart(session, Opened("h"))
            await session.rollback()
        await async_engine.dispose()
        return kept, dropped

    kept, dropped = asyncio.run(place())
    assert states(engine, kept) == {"opener": "running"}
    assert states(engine, dropped) == {}
