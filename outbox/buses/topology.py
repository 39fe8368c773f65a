"""The exchange, the queues and the bindings: declared alike by relays and by workers.

One durable topic exchange carries everything; the routing key is the event type. Each service has one durable queue,
bound to the types that its handlers take. A queue that exists keeps what it gets while its service is down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from kombu import Connection, Exchange, Queue, binding

from outbox.service import Service

QueueType = Literal["quorum", "classic"]

DEFAULT_EXCHANGE: Final = "events"

# RabbitMQ 4 drops a message that has come back 20 times. Counting attempts, and parking what uses them up, is done in
# the database (outbox/attempt.py); a broker that drops would lose it.
_NEVER_DROP: Final = 2_147_483_647


@dataclass(frozen=True)
class Topology:
    """One service's queue and what it is bound to."""

    queue: str
    bindings: tuple[str, ...]
    """Event types."""
    exchange: str = DEFAULT_EXCHANGE
    queue_type: QueueType = "quorum"
    """On RabbitMQ: replicated and safe (quorum), or classic."""

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
        return {}
    return {"x-queue-type": "quorum", "x-delivery-limit": _NEVER_DROP}


def declare(url: str, topology: Topology) -> None:
    """Make exchange, queue and bindings through kombu, over a connection of its own."""
    with Connection(url, connect_timeout=10) as connection:
        kombu_queue(topology)(connection.default_channel).declare()
