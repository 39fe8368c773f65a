"""Sends again, out of the log, what a killed worker had in hand and Redis does not give out again.

A worker takes a message off its Redis list first, and notes that it has it second. Killed in between, it takes the
message with it; killed later, Redis gives the message out again, but looks for such ones only now and then. The outbox
keeps every event, whatever the broker does. RabbitMQ gives back at once what a dead worker had.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from kombu import Connection

from examples.order_saga.demo.traffic import Missing
from outbox.buses import OutgoingMessage, open_bus

IN_HAND_AT_MOST = 4
"""A worker of two threads has no more in hand: one for each, and one that each is about to take."""


def died_in_hand(
    missing: Sequence[Missing], service: str, killed_at: datetime, broker_url: str
) -> bool:
    """Whether all that is missing can only have been in the hands of *service* when it was killed."""
    return (
        broker_url.startswith("redis")
        and all(each.service == service and each.event.occurred_at < killed_at for each in missing)
        and 0 < len({each.event.event_id for each in missing}) <= IN_HAND_AT_MOST
        and _is_empty(f"{service}.events", broker_url)
    )


def replay(missing: Sequence[Missing], broker_url: str) -> int:
    """Send the events to the queues of those who miss them; returns how many events these are."""
    bus = open_bus(broker_url)
    try:
        messages = {
            (each.service, each.event.event_id): OutgoingMessage(
                id=str(each.event.event_id),
                type=each.event.type,
                key=each.event.key,
                body=each.event.body,
                lane=0,
                position=0,
                queue=f"{each.service}.events",
            )
            for each in missing
        }
        bus.send(list(messages.values())).wait()
    finally:
        bus.close()
    return len(messages)


def _is_empty(queue: str, broker_url: str) -> bool:
    with Connection(broker_url) as connection:
        channel: Any = connection.default_channel
        try:
            return bool(channel.queue_declare(queue, passive=True).message_count == 0)
        except connection.channel_errors:
            return True  # in Redis an empty list is no list
