"""Unwinding all at once (`unwind="eager"`): nobody waits for anybody, and in the end nothing is left."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from tests.integration.test_saga_reverse import (
    ORDERS,
    Choose,
    Left,
    Met,
    Opened,
    Right,
    Stage,
    chain,
    diamond,
    settle_without,
)


@pytest.fixture
def stage(shared_engine: Engine) -> Stage:
    return Stage(shared_engine, unwind="eager")


@pytest.fixture(params=ORDERS)
def choose(request: pytest.FixtureRequest) -> Choose:
    return ORDERS[request.param]


def test_a_diamond_is_undone_whole(stage: Stage, choose: Choose) -> None:
    diamond(stage)
    play = stage.play()
    saga_id = stage.start()
    play.settle(choose)
    assert sorted(stage.undone()) == ["-left", "-meet", "-opener", "-right"]
    assert set(stage.states(saga_id).values()) == {"compensated"}


def test_a_participant_undoes_all_of_its_steps(stage: Stage, choose: Choose) -> None:
    stage.step(stage.opener, Opened, Left, "first")
    stage.step(stage.opener, Left, Right, "second")
    stage.step(stage.opener, Right, Met, "third", nothing_to_undo="it only looks")
    stage.refuses(Met)
    play = stage.play()
    saga_id = stage.start()
    play.settle(choose)
    assert sorted(stage.undone()) == ["-first", "-opener", "-second"]
    assert set(stage.states(saga_id).values()) == {"compensated"}


def test_nobody_waits_for_who_is_down_for_the_whole_unwinding(stage: Stage) -> None:
    chain(stage)
    stage.refuses(Met)
    play = stage.play()
    saga_id = stage.start()
    settle_without(play, "refuser")
    settle_without(play, "second")
    assert sorted(stage.undone()) == ["-first", "-opener", "-third"]
    states = stage.states(saga_id)
    assert states.pop("second") == "running"
    assert set(states.values()) == {"compensated"}
    play.settle()
    assert stage.undone()[-1] == "-second"
    assert set(stage.states(saga_id).values()) == {"compensated"}


def test_nobody_waits_for_who_never_heard_of_the_saga_and_it_never_acts(stage: Stage) -> None:
    chain(stage)
    stage.refuses(Opened)
    play = stage.play()
    saga_id = stage.start()
    away = {"second", "third"}
    play.deliver(next(one for one in play.collect() if one.service == "first"))
    settle_without(play, *away)
    assert sorted(stage.undone()) == ["-first", "-opener"]
    play.deliver(next(m for m in play.waiting if (m.service, m.type) == ("second", "saga.aborted")))
    play.settle()
    assert set(stage.states(saga_id).values()) == {"compensated"}
    assert "second" not in stage.done


def test_one_that_undoes_at_once_and_one_that_waits_do_not_wait_for_each_other_for_ever(
    stage: Stage, choose: Choose
) -> None:
    stage.unwind = "reverse"
    chain(stage)
    stage.refuses(Met)
    play = stage.play()
    saga_id = stage.start()
    play.settle(choose)
    waiting = [one for one in stage.undone() if one != "-opener"]
    assert waiting == ["-third", "-second", "-first"]
    assert "-opener" in stage.undone()
    assert set(stage.states(saga_id).values()) == {"compensated"}
