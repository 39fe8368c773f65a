"""Rolls: whatever is lost on its way is missed, asked for and sent again, by itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

import outbox
from outbox import dead_letters, subscriptions
from outbox.buses.base import OutgoingMessage
from outbox.service import Service
from tests.losing import Made, Once, Pair, Sold, is_roll, nothing, number_of, registry
from tests.workers import eventually


@pytest.fixture
def pair(make_migrated_database: Callable[[], str], make_engine: Callable[..., Engine]) -> Pair:
    return Pair(make_engine(make_migrated_database()), make_engine(make_migrated_database()))


def test_lost_events_are_missed_and_sent_again(pair: Pair) -> None:
    pair.wire.loses = Once(lambda message: number_of(message) in {3, 4, 19})
    with pair.relaying():
        pair.publish(*range(20))
        pair.until_whole(*range(20))
    assert pair.asks


def test_what_was_not_lost_is_not_asked_for(pair: Pair) -> None:
    with pair.relaying():
        pair.publish(*range(30))
        pair.publish(*range(30, 60), cls=Sold)
        pair.until_whole(*range(60))
        pair.until_taken(60)
        pair.vigil.look()
    assert not pair.holes
    assert pair.asks == 0


def test_the_only_event_of_its_type_is_missed_too(pair: Pair) -> None:
    pair.wire.loses = Once(lambda message: message.type == "thing.sold" and not is_roll(message))
    with pair.relaying():
        pair.publish(1, cls=Sold)
        pair.until_whole(1)


def test_a_lost_roll_is_missed_by_the_next_one_and_made_again(pair: Pair) -> None:
    with pair.relaying():
        pair.publish(*range(5))
        pair.until_taken(5)
        pair.wire.loses = lambda _: True
        pair.publish(*range(5, 15))
        eventually(lambda: any(is_roll(one) for one in pair.wire.lost), 20)
        pair.wire.loses = nothing
        pair.publish(*range(15, 40))
        pair.until_whole(*range(40))


def test_a_lost_roll_is_missed_when_nothing_comes_after_it(pair: Pair) -> None:
    """Only the lane's standing, which is repeated, can say so then."""
    pair.wire.loses = lambda _: True
    with pair.relaying():
        pair.publish(*range(10))
        eventually(lambda: sum(map(is_roll, pair.wire.lost)) >= 4, 20)
        pair.wire.loses = nothing
        pair.until_whole(*range(10))


def test_a_page_of_a_roll_made_again_can_be_lost(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a roll made again takes as many pages as it needs."""
    monkeypatch.setattr("outbox.replies.MOST", 3)
    pages: list[OutgoingMessage] = []

    def loses(message: OutgoingMessage) -> bool:
        if not is_roll(message) or message.queue is None:
            return False
        pages.append(message)
        return len(pages) % 3 == 1

    pair.wire.loses = lambda _: True
    with pair.relaying():
        pair.publish(*(7 * number for number in range(10)))
        eventually(lambda: sum(map(is_roll, pair.wire.lost)) >= 2, 20)
        pair.wire.loses = loses
        pair.until_whole(*(7 * number for number in range(10)))
    assert len(pages) > 4


def test_more_than_fits_into_messages_is_asked_for_by_pages(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.roll_caller._MOST_AT_ONCE", 5)
    pair.wire.loses = Once(lambda message: number_of(message) in {3, 4, 19})
    with pair.relaying():
        pair.publish(*range(20))
        pair.until_whole(*range(20))


def test_what_a_relay_had_sent_when_it_died_is_named_by_the_next(pair: Pair) -> None:
    pair.wire.loses = Once(lambda message: number_of(message) == 2)
    with pair.relaying(rolls=timedelta(hours=1)):
        pair.publish(*range(5))
        eventually(lambda: len(pair.effects) == 4)
    with pair.relaying():
        pair.until_whole(*range(5))


def test_a_late_commit_is_named_like_any_other(pair: Pair) -> None:
    """Its position lies below events that were named long before."""
    pair.wire.loses = Once(lambda message: number_of(message) == 0)
    slow = Session(pair.source_engine)
    slow.begin()
    savepoint = slow.begin_nested()
    outbox.publish(slow, Made(0, 0), registry=registry)
    savepoint.commit()
    with pair.relaying():
        pair.publish(*range(1, 20))
        pair.until_taken(19)
        slow.commit()
        slow.close()
        pair.until_whole(*range(20))


def test_events_sent_again_in_another_order_make_no_hole(pair: Pair) -> None:
    with pair.relaying():
        pair.publish(*range(20))
        pair.until_taken(20)
    pair.run("DELETE FROM outbox.outbox_cursor", pair.source_engine)
    with pair.relaying():
        pair.publish(*range(20, 25))
        pair.until_whole(*range(25))
        pair.until_taken(25)
        pair.vigil.look()
    assert pair.asks == 0


def test_what_was_published_before_the_subscription_is_not_missed(pair: Pair) -> None:
    pair.run("DELETE FROM outbox.subscription")
    pair.wire.loses = lambda _: True
    with pair.relaying():
        pair.publish(*range(10))
        eventually(lambda: sum(map(is_roll, pair.wire.lost)) >= 2, 20)
        pair.note()
        pair.wire.loses = nothing
        pair.publish(*range(10, 20))
        pair.until_whole(*range(10, 20))
        pair.until_taken(10)
        pair.vigil.look()
    assert pair.asks == 0


def test_an_event_that_is_parked_or_waits_for_a_person_is_not_asked_for(pair: Pair) -> None:
    pair.fails_on = {2}
    with pair.relaying():
        pair.publish(1, 2, 3)
        pair.until_whole(1, 3)
        pair.until_taken(3)
        pair.vigil.look()
    assert [row.type for row in pair.rows("SELECT type FROM outbox.dead_letter")] == ["thing.made"]
    assert not pair.holes
    assert pair.asks == 0


def test_a_discarded_event_is_not_run_when_a_copy_comes(pair: Pair) -> None:
    pair.fails_on = {2}
    with pair.relaying():
        pair.publish(2)
        eventually(lambda: pair.rows("SELECT FROM outbox.dead_letter"))
    with Session(pair.engine) as session, session.begin():
        assert dead_letters.discard(session, dead_letters.Matching(), "not needed") == 1
    pair.fails_on = set()
    (event,) = [one for one in pair.wire.sent if not is_roll(one)]
    pair.receiver.receive(event.body)
    assert pair.effects == []


def test_an_event_that_the_log_has_no_more_is_said_to_be_gone(pair: Pair) -> None:
    pair.wire.loses = lambda message: number_of(message) == 1
    with pair.relaying():
        pair.publish(1, 2)
        pair.until_taken(2)
        (lost,) = pair.wire.lost
        pair.run(
            f"DELETE FROM outbox.outbox_event WHERE position = {lost.position}",
            pair.source_engine,
        )

        def is_gone() -> bool:
            pair.vigil.look()
            return bool(pair.holes) and pair.holes[0].gone_at is not None

        eventually(is_gone, 20, lambda: pair.holes)
    assert [hole.event_id for hole in pair.holes] == [UUID(lost.id)]


def test_a_handlers_name_that_two_services_of_one_schema_have_is_said(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.note()
    assert not caplog.records
    namesake = Service("till", registry=registry)
    namesake.on(Made, name="stock.count")(pair._count)
    with Session(pair.engine) as session, session.begin():
        subscriptions.note(session, namesake)
    assert "handler stock.count is of service till here and of service stock" in caplog.text
