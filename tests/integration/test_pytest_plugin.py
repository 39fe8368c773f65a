"""The fixtures that the pytest plugin gives to a user's own tests, run as a user would."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

SERVICES = """
    from dataclasses import dataclass
    from datetime import timedelta
    from outbox.events import Registry
    from outbox import Service
    from saga import Participant, Reject

    registry = Registry()

    @registry.event("shop.placed", key="id")
    @dataclass(frozen=True)
    class Placed:
        id: str
        amount: int = 1

    @registry.event("shop.packed", key="id")
    @dataclass(frozen=True)
    class Packed:
        id: str

    @registry.event("shop.refused", key="id")
    @dataclass(frozen=True)
    class Refused:
        id: str

    @registry.event("shop.too_late", key="id")
    @dataclass(frozen=True)
    class TooLate:
        id: str

    shop = Participant("shop", registry=registry)
    shop.starts(Placed, nothing_to_undo="nothing is written")
    pack = Participant("pack", registry=registry)
    done = []

    @shop.join(Packed, completes=True)
    def end(packed, session):
        done.append(("end", packed.id))

    @shop.deadline(minutes=15, rejects=TooLate)
    def give_up(placed, session):
        return TooLate(placed.id)

    @pack.step(on=Placed, emits=Packed, rejects=Refused)
    def pack_it(placed, session):
        if placed.amount == 0:
            raise ValueError("nothing to pack")
        if placed.amount > 9:
            raise Reject(Refused(placed.id))
        done.append(("pack", placed.id))
        return Packed(placed.id)

    @pack_it.compensation
    def unpack(placed, packed, session):
        done.append(("unpack", placed.id))

    @pack.step(on=Placed, after=timedelta(days=1), nothing_to_undo="a reminder")
    def remind(placed, session):
        done.append(("remind", placed.id))
"""
TESTS = """
    from uuid import uuid4
    import pytest
    from sqlalchemy.orm import Session
    from services import Packed, Placed, Refused, done, pack, shop

    def test_a_step_answers(saga_participant):
        stock = saga_participant(pack)
        saga_id = stock.hear(Placed("a"))
        assert stock.published == [Packed("a")]
        assert stock.state(saga_id) == "running"
        stock.complete(saga_id)
        assert stock.state(saga_id) == "completed"

    def test_an_abort_undoes(saga_participant):
        stock = saga_participant(pack)
        assert stock.published == []
        saga_id = stock.hear(Placed("b"))
        stock.abort(saga_id)
        assert done[-2:] == [("pack", "b"), ("unpack", "b")]
        assert stock.state(saga_id) == "compensated"
        stock.hear(Placed("b again"), saga_id=saga_id)
        assert done[-1] == ("unpack", "b")

    def test_a_rejection_is_said(saga_participant):
        stock = saga_participant(pack)
        saga_id = stock.hear(Placed("c", 10))
        assert stock.published == [Refused("c")]
        assert stock.state(saga_id) == "compensated"

    def test_a_failure_is_the_tests_failure(saga_participant):
        stock = saga_participant(pack)
        with pytest.raises(AssertionError, match="ValueError: nothing to pack"):
            stock.hear(Placed("d", 0))
        stock.hear(Placed("e", 0), may_fail=True)
        assert stock.published == []

    def test_what_is_not_taken_is_the_tests_failure(saga_participant):
        with pytest.raises(AssertionError, match="pack does not take shop.packed"):
            saga_participant(pack).hear(Packed("f"))

    def test_all_together(saga_choreography, saga_engine):
        play = saga_choreography(shop, pack)
        with Session(saga_engine) as session, session.begin():
            shop.start(session, Placed("g"))
        play.settle()
        assert done[-3:] == [("pack", "g"), ("end", "g"), ("remind", "g")]
        assert ("pack", "d") not in done

    def test_what_is_due_later_comes_when_the_test_says_so(saga_participant):
        stock = saga_participant(pack)
        stock.hear(Placed("h"))
        assert done[-1] == ("pack", "h")
        stock.let_time_pass()
        assert done[-1] == ("remind", "h")

    def test_a_deadline_can_come_before_all_else(saga_choreography, saga_engine):
        play = saga_choreography(shop, pack)
        with Session(saga_engine) as session, session.begin():
            shop.start(session, Placed("i"))
        play.deliver(play.owed("shop.give_up"))
        play.settle()
        assert ("end", "i") not in done
        with pytest.raises(LookupError, match="nothing is owed to shop.give_up; owed is nothing"):
            play.owed("shop.give_up")
"""


@pytest.fixture
def user(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project of somebody's own."""
    pytester.makepyfile(services=SERVICES, test_services=TESTS)
    return pytester


@pytest.mark.parametrize(
    ("given", "fixture"), [("url", "database_url"), ("engine", "migrated_database_url")]
)
def test_participants_run_without_a_broker_on_the_database_given(
    given: str, fixture: str, user: pytest.Pytester, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(fixture)
    value = repr(url) if given == "url" else f"sqlalchemy.create_engine({url!r})"
    user.makeconftest(
        f"import pytest, sqlalchemy\n@pytest.fixture(scope='session')\n"
        f"def saga_database():\n    return {value}\n"
    )
    result = user.runpytest_subprocess("-q", "-p", "saga.testing.pytest_plugin")
    result.assert_outcomes(passed=8)


def test_without_a_database_the_failure_says_what_to_define(user: pytest.Pytester) -> None:
    result = user.runpytest_subprocess(
        "-q", "-p", "saga.testing.pytest_plugin", "-k", "test_a_step_answers"
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*define a fixture `saga_database` in conftest.py*"])


def test_the_plugin_is_light_to_load(user: pytest.Pytester) -> None:
    user.makepyfile(
        test_light="""
        import sys

        def test_light():
            assert "saga.testing.pytest_plugin" in sys.modules
            assert "sqlalchemy" not in sys.modules
            assert "celery" not in sys.modules
        """
    )
    result = user.runpytest_subprocess("-q", "-p", "saga.testing.pytest_plugin", "test_light.py")
    result.assert_outcomes(passed=1)
