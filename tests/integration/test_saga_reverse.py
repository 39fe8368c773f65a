"""Unwinding in reverse causal order: whatever the shape, whoever is away, and whoever is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outbox.events import Registry
from saga import Participant, Reject
from saga.participant import Unwinding
from saga.retiring import forget_peer
from saga.testing.choreography import Choreography, Message


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@dataclass(frozen=True)
class Opened:
    name: str


@dataclass(frozen=True)
class Left:
    name: str


@dataclass(frozen=True)
class Right:
    name: str


@dataclass(frozen=True)
class Met:
    name: str


@dataclass(frozen=True)
class Refused:
    name: str


class Stage:
    """Participants on one database, and the order in which they do and undo."""

    def __init__(self, engine: Engine, unwind: Unwinding = "reverse") -> None:
        self.engine = engine
        self.unwind = unwind
        self.registry = Registry()
        for cls in (Opened, Left, Right, Met, Refused):
            self.registry.event(f"shape.{cls.__name__.lower()}", key="name")(cls)
        self.done: list[str] = []
        self.participants: list[Participant] = []
        self.opener = self.participant("opener")

        @self.opener.compensation(Opened)
        def close(opened: Opened, session: Session) -> None:
            self.done.append("-opener")

    def participant(self, name: str) -> Participant:
        self.participants.append(Participant(name, registry=self.registry, unwind=self.unwind))
        return self.participants[-1]

    def step(
        self,
        owner: Participant,
        on: type,
        emits: type | None,
        name: str,
        *,
        nothing_to_undo: str | None = None,
    ) -> None:
        @owner.step(on=on, emits=emits, name=name, nothing_to_undo=nothing_to_undo)
        def act(event: Opened, session: Session) -> object:
            self.done.append(name)
            return None if emits is None else emits(event.name)

        if nothing_to_undo is not None:
            return
        if emits is None:
            act.compensation(lambda event, session: self.done.append(f"-{name}"))
        else:
            act.compensation(lambda event, emitted, session: self.done.append(f"-{name}"))

    def refuses(self, on: type, name: str = "refuser") -> Participant:
        refuser = self.participant(name)

        @refuser.step(on=on, rejects=Refused)
        def refuse(event: Opened, session: Session) -> None:
            raise Reject(Refused(event.name))

        return refuser

    def play(self, *, acquainted: bool = True) -> Choreography:
        return Choreography(dict.fromkeys(self.participants, self.engine), acquainted=acquainted)

    def start(self) -> UUID:
        with Session(self.engine) as session, session.begin():
            return self.opener.start(session, Opened("x"))

    def states(self, saga_id: UUID) -> dict[str, str]:
        with self.engine.connect() as connection:
            rows = connection.execute(
                text("SELECT participant, state FROM outbox.saga WHERE saga_id = :id"),
                {"id": saga_id},
            )
            return {row.participant: row.state for row in rows}

    def undone(self) -> list[str]:
        return [one for one in self.done if one.startswith("-")]


@pytest.fixture
def stage(engine: Engine) -> Stage:
    return Stage(engine)


Choose = Callable[[list[Message]], Message]
ORDERS: dict[str, Choose] = {"oldest first": lambda w: w[0], "newest first": lambda w: w[-1]}


@pytest.fixture(params=ORDERS)
def choose(request: pytest.FixtureRequest) -> Choose:
    return ORDERS[request.param]


def settle_without(play: Choreography, *away: str) -> None:
    """Deliver whatever is for somebody who is not away."""
    while here := [one for one in play.collect() if one.service not in away]:
        play.deliver(here[0])


def chain(stage: Stage) -> None:
    stage.step(stage.participant("first"), Opened, Left, "first")
    stage.step(stage.participant("second"), Left, Right, "second")
    stage.step(stage.participant("third"), Right, Met, "third")


def test_a_chain_is_undone_from_its_end(stage: Stage, choose: Choose) -> None:
    chain(stage)
    stage.refuses(Met)
    play = stage.play()
    saga_id = stage.start()
    play.settle(choose)
    assert stage.undone() == ["-third", "-second", "-first", "-opener"]
    assert set(stage.states(saga_id).values()) == {"compensated"}


def diamond(stage: Stage) -> None:
    stage.step(stage.participant("left"), Opened, Left, "left")
    stage.step(stage.participant("right"), Opened, Right, "right")
    meeting = stage.participant("meeting")

    @meeting.join(Left, Right, emits=Met)
    def meet(left: Left, right: Right, session: Session) -> Met:
        stage.done.append("meet")
        return Met(left.name)

    @meet.compensation
    def part(left: Left, right: Right, met: Met, session: Session) -> None:
        stage.done.append("-meet")

    stage.refuses(Met)


def test_a_diamond_is_undone_from_its_join(stage: Stage, choose: Choose) -> None:
    diamond(stage)
    play = stage.play()
    saga_id = stage.start()
    play.settle(choose)
    meeting_first, *branches, last = stage.undone()
    assert (meeting_first, sorted(branches), last) == ("-meet", ["-left", "-right"], "-opener")
    assert set(stage.states(saga_id).values()) == {"compensated"}


def test_a_participant_undoes_its_own_steps_in_their_reverse_order(
    stage: Stage, choose: Choose
) -> None:
    stage.step(stage.opener, Opened, Left, "first")
    stage.step(stage.opener, Left, Right, "second")
    stage.step(stage.opener, Right, Met, "third", nothing_to_undo="it only looks")
    stage.step(stage.opener, Met, None, "fourth")
    refuser = stage.participant("refuser")

    @refuser.join(Met, Right, rejects=Refused)
    def refuse(met: Met, right: Right, session: Session) -> None:
        raise Reject(Refused(met.name))

    play = stage.play()
    saga_id = stage.start()
    play.settle(lambda waiting: next((m for m in waiting if m.service == "opener"), waiting[0]))
    assert stage.undone() == ["-fourth", "-second", "-first", "-opener"]
    assert set(stage.states(saga_id).values()) == {"compensated"}


def test_who_is_down_is_waited_for_by_its_causes_and_by_nobody_else(stage: Stage) -> None:
    chain(stage)
    stage.step(stage.participant("aside"), Opened, None, "aside")
    stage.refuses(Met)
    play = stage.play()
    saga_id = stage.start()
    settle_without(play, "refuser")
    settle_without(play, "second")
    assert sorted(stage.undone()) == ["-aside", "-third"]
    states = stage.states(saga_id)
    assert {name for name, state in states.items() if state == "compensated"} == {
        "aside", "refuser", "third",
    }  # fmt: skip
    play.settle()
    assert stage.undone()[-3:] == ["-second", "-first", "-opener"]


def test_who_never_heard_of_the_saga_is_waited_for_until_it_seals_it(stage: Stage) -> None:
    chain(stage)
    stage.refuses(Opened)
    play = stage.play()
    saga_id = stage.start()
    away = {"second", "third"}
    settle_without(play, *away)
    assert stage.undone() == []
    seal = next(m for m in play.waiting if (m.service, m.type) == ("second", "saga.aborted"))
    play.deliver(seal)
    settle_without(play, *away)
    assert stage.undone() == ["-first", "-opener"]
    play.settle()
    assert set(stage.states(saga_id).values()) == {"compensated"}
    assert "second" not in stage.done


def test_who_was_never_introduced_is_not_waited_for_and_all_is_undone(
    stage: Stage, choose: Choose
) -> None:
    chain(stage)
    stage.refuses(Met)
    with stage.engine.begin() as connection:
        connection.execute(text("DELETE FROM outbox.saga_peer"))
    play = stage.play(acquainted=False)
    saga_id = stage.start()
    play.settle(choose)
    assert sorted(stage.undone()) == ["-first", "-opener", "-second", "-third"]
    assert set(stage.states(saga_id).values()) == {"compensated"}


def test_a_word_that_comes_before_the_abort_seals_the_saga(stage: Stage) -> None:
    chain(stage)
    stage.refuses(Opened)
    play = stage.play()
    saga_id = stage.start()
    play.deliver(next(m for m in play.collect() if m.service == "refuser"))
    word = next(m for m in play.collect() if (m.service, m.type) == ("first", "saga.undone"))
    play.deliver(word)
    assert stage.states(saga_id)["first"] == "compensated"
    play.settle()
    assert stage.done == ["-opener"]


def test_words_that_come_in_the_wrong_order_say_the_same(stage: Stage) -> None:
    chain(stage)
    stage.refuses(Met)
    play = stage.play()
    saga_id = stage.start()

    def words_backwards(waiting: list[Message]) -> Message:
        others = [one for one in waiting if one.type != "saga.undone"]
        return others[0] if others else waiting[-1]

    play.settle(words_backwards)
    for one in [m for m in play.delivered if m.type == "saga.undone"]:
        play.deliver(one)
    play.settle()
    assert stage.undone() == ["-third", "-second", "-first", "-opener"]
    assert set(stage.states(saga_id).values()) == {"compensated"}


# ---- getting to know each other ----


def known(stage: Stage, participant: Participant) -> dict[str, list[str]]:
    with Session(stage.engine) as session:
        return {peer: sorted(takes) for peer, takes in participant.journal(session).peers().items()}


def test_participants_get_to_know_each_other_whoever_comes_first(
    stage: Stage, choose: Choose
) -> None:
    chain(stage)
    with stage.engine.begin() as connection:
        connection.execute(text("DELETE FROM outbox.saga_peer"))
    here: list[Participant] = []
    for newcomer in stage.participants:
        # A queue exists from when its service first comes up; what was said before is not heard.
        here.append(newcomer)
        play = Choreography(dict.fromkeys(here, stage.engine), acquainted=False)
        for participant in here:
            participant.see_to_introduction(stage.engine)
        play.settle(choose)
    expected = {
        "opener": [],
        "first": ["shape.opened"],
        "second": ["shape.left"],
        "third": ["shape.right"],
    }
    assert [known(stage, one) for one in stage.participants] == [expected] * 4
    for participant in stage.participants:
        participant.see_to_introduction(stage.engine)
    assert play.collect() == []


def test_a_participant_that_answers_more_than_before_says_so(stage: Stage) -> None:
    first, second = stage.participant("first"), stage.participant("second")
    play = stage.play()
    stage.step(first, Opened, None, "first")
    first.see_to_introduction(stage.engine)
    introduction = play.settle() and play.delivered[-1]
    assert known(stage, second)["first"] == ["shape.opened"]
    stage.step(first, Met, None, "again")
    first.see_to_introduction(stage.engine)
    play.settle()
    assert known(stage, second)["first"] == ["shape.met", "shape.opened"]
    assert isinstance(introduction, Message)


def test_an_older_introduction_that_comes_late_changes_nothing(stage: Stage) -> None:
    first, second = stage.participant("first"), stage.participant("second")
    play = stage.play()
    for on in (Opened, Met):
        stage.step(first, on, None, f"on_{on.__name__.lower()}")
        first.see_to_introduction(stage.engine)
        for owed in [one for one in play.collect() if one.handler]:
            play.deliver(owed)
    older, newer = [
        m for m in play.collect() if (m.service, m.type) == ("second", "saga.introduced")
    ]
    play.deliver(newer)
    play.deliver(older)
    assert known(stage, second)["first"] == ["shape.met", "shape.opened"]


def test_a_retired_participant_can_be_forgotten_and_holds_up_nobody(stage: Stage) -> None:
    chain(stage)
    stage.refuses(Opened)
    play = stage.play()
    saga_id = stage.start()
    retired = {"second", "third"}
    settle_without(play, *retired)
    assert stage.states(saga_id)["first"] == "compensating"
    assert forget_peer(stage.engine, "second")["first"] >= 1
    settle_without(play, *retired)
    assert stage.undone() == ["-first", "-opener"]
