"""What a killed worker had in hand, and Redis does not give out again, is sent again from the log."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from kombu import Connection

from examples.order_saga.demo.books import Published
from examples.order_saga.demo.replay import IN_HAND_AT_MOST, died_in_hand, replay
from examples.order_saga.demo.traffic import Missing
from outbox.buses.topology import Topology, declare

KILLED_AT = datetime(2026, 1, 1, tzinfo=UTC)


def missing(service: str = "users", *, seconds_before_the_kill: float = 1) -> Missing:
    when = KILLED_AT - timedelta(seconds=seconds_before_the_kill)
    event = Published(uuid4(), "order.created", "1", when, b'{"specversion":"1.0"}')
    return Missing(event, service, f"{service}.add_points")


def test_a_replayed_event_is_in_the_queue_of_the_one_who_missed_it(redis_url: str) -> None:
    declare(redis_url, Topology("users.events", ("order.created",)))
    declare(redis_url, Topology("shipping.events", ("order.created",)))
    lost = missing()
    assert died_in_hand([lost], "users", KILLED_AT, redis_url)
    assert replay([lost, lost], redis_url) == 1
    with Connection(redis_url) as connection:
        message = connection.SimpleQueue("users.events").get(timeout=5)
        message.ack()
        (body,), _, _ = json.loads(message.body)
        assert body.encode() == lost.event.body
        assert connection.default_channel.client.llen("shipping.events") == 0
    assert died_in_hand([lost], "users", KILLED_AT, redis_url)


def test_an_event_that_still_waits_in_the_queue_is_not_missing(redis_url: str) -> None:
    lost = missing()
    replay([lost], redis_url)
    assert not died_in_hand([lost], "users", KILLED_AT, redis_url)


@pytest.mark.parametrize(
    "unexplained",
    [
        [],
        [missing("shipping")],
        [missing(), missing("shipping")],
        [missing(seconds_before_the_kill=-1)],
        [missing() for _ in range(IN_HAND_AT_MOST + 1)],
    ],
    ids=["nothing", "another service's", "also another's", "after the kill", "too many"],
)
def test_what_the_kill_cannot_explain_stays_a_loss(
    redis_url: str, unexplained: list[Missing]
) -> None:
    assert not died_in_hand(unexplained, "users", KILLED_AT, redis_url)


def test_rabbitmq_has_no_such_excuse() -> None:
    assert not died_in_hand([missing()], "users", KILLED_AT, "amqp://nowhere")
