"""How the sweeper sends to the service's own topic: retries, timers and redrives."""

from __future__ import annotations

from collections.abc import Sequence

from outbox import rolls
from outbox.buses.base import Bus, OutgoingMessage
from outbox.ids import new_id
from outbox.pending import PendingDelivery


class OwnTopic:
    """Sends owed deliveries, over a bus that nobody else uses at the same time."""

    def __init__(self, bus: Bus, queue: str) -> None:
        self._bus = bus
        self._queue = queue

    def __call__(self, batch: Sequence[PendingDelivery]) -> None:
        """Raises `BusError` if the broker did not take them all."""
        self._bus.send([self._addressed(owed) for owed in batch]).wait()

    def send_to(self, queue: str, body: bytes) -> None:
        """Send one message between relays and workers to any topic. Raises `BusError`."""
        message = OutgoingMessage(new_id(), rolls.ASK, None, body, 0, 0, queue=queue)
        self._bus.send([message]).wait()

    def _addressed(self, owed: PendingDelivery) -> OutgoingMessage:
        return OutgoingMessage(
            event_id=owed.event_id,
            type=owed.type,
            key=owed.key,
            body=owed.body,
            lane=0,
            position=0,
            key_seq=owed.key_seq,
            queue=self._queue,
            handler=owed.handler,
        )
