"""The exchange, the queues and the bindings: declared alike by relays and by workers.

One durable topic exchange carries everything; the routing key is the event type. Each service has one durable queue,
bound to the types that its handlers take. A queue that exists keeps what it gets while its service is down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from kombu import Connection, Exchange, Queue, binding

from outbox.errors import ConfigurationError
from outbox.service import Service

QueueType = Literal["quorum", "classic"]

DEFAULT_EXCHANGE: Final = "events"

_LONGEST_NAME: Final = 255

# RabbitMQ 4 drops a message that has come back 20 times. Counting attempts, and parking what uses them up, is done in
# the database (outbox/attempt.py); a broker that drops would lose it.
_NEVER_DROP: Final = 2_147_483_647

# Only matters once somebody limits the queue's length, by a policy say. RabbitMQ would then throw away its oldest
# messages; so it refuses new ones, and the relay keeps them in the log and tries again.
_REFUSE_WHEN_FULL: Final = {"x-overflow": "reject-publish"}


@dataclass(frozen=True)
class Topology:
    """One service's queue and what it is bound to. Raises `ConfigurationError` for names that no broker takes."""

    queue: str
    bindings: tuple[str, ...]
    """Event types; as on every topic exchange, `*` stands for one word and `#` for any number."""
    exchange: str = DEFAULT_EXCHANGE
    queue_type: QueueType = "quorum"
    """On RabbitMQ: replicated and safe (quorum), or classic."""

    def __post_init__(self) -> None:
        for name in (self.queue, self.exchange, *self.bindings):
            if not 0 < len(name.encode()) <= _LONGEST_NAME or not name.isprintable():
                raise ConfigurationError(
                    f"{name[:300]!r} can be no queue, exchange or binding: 1 to 255 printable characters"
                )

    @classmethod
    def of(cls, service: Service, *, queue_type: QueueType = "quorum") -> Topology:
        """What *service* needs for the handlers that it has now."""
        return cls(service.queue, tuple(service.bindings), service.exchange, queue_type)


def kombu_exchange(name: str) -> Exchange:
    """The topic exchange, as Celery and kombu declare it."""
    return Exchange(name, type="topic", durable=True)


def kombu_queue(topology: Topology) -> Queue:
    """The service's queue, as Celery and kombu declare it. Redis has no use for the arguments."""
    exchange = kombu_exchange(topology.exchange)
    return Queue(
        topology.queue,
        exchange=exchange,
        bindings=[binding(exchange, routing_key=event_type) for event_type in topology.bindings],
        durable=True,
        queue_arguments=queue_arguments(topology),
    )


def queue_arguments(topology: Topology) -> dict[str, Any]:
    """RabbitMQ's arguments for the queue; both sides must give the same."""
    if topology.queue_type == "classic":
        return dict(_REFUSE_WHEN_FULL)
    return {"x-queue-type": "quorum", "x-delivery-limit": _NEVER_DROP, **_REFUSE_WHEN_FULL}


def declare(url: str, topology: Topology, *, transport_options: Any = None) -> None:
    """Make exchange, queue and bindings through kombu, over a connection of its own."""
    with Connection(url, connect_timeout=10, transport_options=transport_options) as connection:
        kombu_queue(topology)(connection.default_channel).declare()
