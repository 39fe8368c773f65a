"""How the sweeper sends to the service's own topic: retries, timers and redrives."""

from __future__ import annotations

from collections.abc import Sequence

from outbox.addressing import asking_message, delivery_message
from outbox.buses.base import Bus
from outbox.pending import PendingDelivery


class OwnTopic:
    """Sends owed deliveries, over a bus that nobody else uses at the same time."""

    def __init__(self, bus: Bus, queue: str) -> None:
        self._bus = bus
        self._queue = queue

    def __call__(self, batch: Sequence[PendingDelivery]) -> None:
        """Raises `BusError` if the broker did not take them all."""
        self._bus.send([delivery_message(owed, self._queue) for owed in batch]).wait()

    def send_to(self, queue: str, body: bytes) -> None:
        """Send one message between relays and workers to any topic. Raises `BusError`."""
        self._bus.send([asking_message(body, queue)]).wait()
