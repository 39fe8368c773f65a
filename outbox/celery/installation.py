"""What `outbox.celery.setup` makes of an app, and where it is found again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Engine

from outbox.bell import Bell
from outbox.buses.topology import QueueType, Topology, kombu_exchange, kombu_queue
from outbox.errors import ConfigurationError
from outbox.receive import Receiver, ReceiveSettings
from outbox.service import Service
from outbox.sweeper import SweepSettings

if TYPE_CHECKING:
    from celery import Celery

CONSUMER: Final = "outbox.celery.consumer:Consumer"


@dataclass
class Installation:
    """What `setup` made of an app."""

    service: Service
    database: str | URL | Engine
    settings: ReceiveSettings
    sweep: SweepSettings
    receiver: Receiver
    bell: Bell
    queue_type: QueueType
    allow_eager: bool
    batch_size: int = 1
    """Messages that a worker hands to its pool at once, at most; its option says so."""

    @property
    def queue(self) -> Any:
        """The service's queue as the broker should have it, bound to what handlers take now."""
        topology = Topology.of(self.service, queue_type=self.queue_type)
        queue: Any = kombu_queue(topology)
        # kombu leaves a queue of several bindings without an exchange, and Celery then binds it to
        # its default one: where the app's own tasks go.
        queue.exchange = kombu_exchange(topology.exchange)
        queue.routing_key = next(iter(topology.bindings), "")
        return queue


_installations: WeakKeyDictionary[Celery, Installation] = WeakKeyDictionary()


def installed(app: Celery) -> Installation:
    """What `setup` made of *app*. Raises `ConfigurationError` where it was not called."""
    try:
        return _installations[app]
    except KeyError:
        raise ConfigurationError(
            f"app {app.main!r} serves no service: call outbox.celery.setup(app, service, ...)"
        ) from None


def install(app: Celery, installation: Installation) -> None:
    """Raises `ConfigurationError` where *app* serves a service already."""
    if app in _installations:
        raise ConfigurationError(
            f"app {app.main!r} serves {_installations[app].service} already: one service per app"
        )
    _installations[app] = installation
