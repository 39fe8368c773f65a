"""Pushing many messages to one queue on Redis with one command, over kombu's connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import message_body
from outbox.buses.redis_wire import EntryEncoder


class Pusher:
    """Makes the entries that kombu would have made, which takes a round trip for each of them."""

    def __init__(self) -> None:
        self._encoder = EntryEncoder()

    def push(self, channel: Any, queue: str, messages: Sequence[OutgoingMessage]) -> None:
        """Push *messages* in their order. Raises what redis-py raises; then none of them may be there, or all."""
        entries = [self._encoder.encode(one, message_body(one), queue) for one in messages]
        with channel.conn_or_acquire() as client:
            client.lpush(channel._q_for_pri(queue, 0), *entries)
