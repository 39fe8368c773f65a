"""Redis, through the same virtual topic exchange that kombu's transport uses, but a whole batch at a time.

kombu keeps the bindings of an exchange in a set and a queue in a list; it looks the set up for each message and pushes
each copy by itself. Here the set is read once a second, and a batch becomes one pipeline with one LPUSH per queue. What
a Celery worker finds in its queue is the same. That the pipeline has been answered is the broker's confirmation; how
durable it is then, Redis's own persistence decides (`outbox doctor` looks at it).
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import redis

from outbox.buses.base import Confirmation, OutgoingMessage
from outbox.buses.message import CONTENT_ENCODING, CONTENT_TYPE, celery_message
from outbox.buses.topology import DEFAULT_EXCHANGE, Topology, declare
from outbox.errors import BusError

log = logging.getLogger(__name__)

_BINDINGS: Final = "_kombu.binding.%s"
_SEPARATOR: Final = "\x06\x16"
_REFRESH_AFTER: Final = 1.0
_TIMEOUT: Final = 10.0


@dataclass(frozen=True)
class _Taken:
    """Redis has answered already when `send` returns."""

    def wait(self) -> None:
        return


class RedisBus:
    """A connection to Redis. Made when it is first used, and again after an error."""

    def __init__(
        self, url: str, exchange: str = DEFAULT_EXCHANGE, *, timeout: float = _TIMEOUT
    ) -> None:
        """*timeout*: seconds for connecting and for each answer."""
        self._url = url
        self._exchange = exchange
        self._client = redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout
        )
        self._bindings: list[tuple[re.Pattern[str], str]] = []
        self._queues_of: dict[str, list[str]] = {}
        self._read_at = float("-inf")
        self.unrouted = 0
        """Events that no queue was bound to: legal, but perhaps not meant."""

    def declare(self, topology: Topology) -> None:
        try:
            declare(self._url, topology)
        except Exception as error:
            raise BusError(
                f"could not declare queue {topology.queue!r} on Redis: {error}"
            ) from error
        self._read_at = float("-inf")

    def send(self, batch: Sequence[OutgoingMessage]) -> Confirmation:
        try:
            self._refresh()
            values: dict[str, list[bytes]] = {}
            for message in batch:
                queues = (
                    [message.queue] if message.queue is not None else self._queues(message.type)
                )
                for queue in queues:
                    exchange, key = (
                        ("", queue) if message.queue is not None else (self._exchange, message.type)
                    )
                    values.setdefault(queue, []).append(_stored(message, exchange, key))
                self.unrouted += not queues
            if values:
                pipeline = self._client.pipeline(transaction=False)
                for queue, pushed in values.items():
                    pipeline.lpush(queue, *pushed)
                pipeline.execute()
        except redis.RedisError as error:
            self._read_at = float("-inf")
            raise BusError(f"Redis did not take {len(batch)} messages: {error}") from error
        return _Taken()

    def keep_alive(self) -> None:
        """redis-py makes a broken connection anew when it is next used."""

    def close(self) -> None:
        self._client.close()

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read_at < _REFRESH_AFTER:
            return
        members: Any = self._client.smembers(_BINDINGS % self._exchange)
        entries = sorted(member.decode().split(_SEPARATOR) for member in members)
        self._bindings = [
            (re.compile(pattern or re.escape(key)), queue) for key, pattern, queue in entries
        ]
        self._queues_of.clear()
        self._read_at = now

    def _queues(self, event_type: str) -> list[str]:
        if event_type not in self._queues_of:
            found = [queue for pattern, queue in self._bindings if pattern.match(event_type)]
            self._queues_of[event_type] = list(dict.fromkeys(found))
            if not found:
                log.warning(
                    "no queue is bound to %s on exchange %r; such events go nowhere",
                    event_type,
                    self._exchange,
                )
        return self._queues_of[event_type]


def _stored(message: OutgoingMessage, exchange: str, routing_key: str) -> bytes:
    """The list entry that kombu's Redis transport would have made."""
    celery = celery_message(message)
    return json.dumps(
        {
            "body": base64.b64encode(celery.body).decode("ascii"),
            "content-encoding": CONTENT_ENCODING,
            "content-type": CONTENT_TYPE,
            "headers": celery.headers,
            "properties": {
                "correlation_id": celery.headers["id"],
                "delivery_mode": 2,
                "delivery_info": {"exchange": exchange, "routing_key": routing_key},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    ).encode()
