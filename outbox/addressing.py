"""Messages that a worker sends by itself, each to one queue: what its service is owed, and what it asks of a source."""

from __future__ import annotations

from outbox import rolls
from outbox.buses.base import OutgoingMessage
from outbox.ids import new_id
from outbox.pending import PendingDelivery


def delivery_message(owed: PendingDelivery, queue: str) -> OutgoingMessage:
    """An owed delivery, to the one handler that it is owed to."""
    return OutgoingMessage(
        id=str(owed.event_id),
        type=owed.type,
        key=owed.key,
        body=owed.body,
        lane=0,
        position=0,
        key_seq=owed.key_seq,
        queue=queue,
        handler=owed.handler,
    )


def asking_message(body: bytes, queue: str) -> OutgoingMessage:
    """A message from a worker to relays (see `outbox.rolls`)."""
    return OutgoingMessage(str(new_id()), rolls.ASK, None, body, lane=0, position=0, queue=queue)
