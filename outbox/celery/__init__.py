"""Celery workers as consumers of events.

    app = Celery("billing", broker="amqp://...")
    setup(app, billing, database_url="postgresql://...")

makes plain `celery -A billing worker` consume the service's queue, bound to the types that its
handlers take. Call it after the handlers are registered, or before: bindings are read when the
worker starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from billiard.exceptions import SoftTimeLimitExceeded
from celery import signals
from sqlalchemy import URL, Engine

from outbox.buses.topology import QueueType, Topology, kombu_queue
from outbox.celery.engines import ForkSafeEngine
from outbox.celery.sweeping import SweeperStep
from outbox.celery.task import TASK_NAME, ReceiveTask
from outbox.errors import ConfigurationError
from outbox.receive import Receiver, ReceiveSettings
from outbox.service import Service
from outbox.sweeper import SweepSettings

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["TASK_NAME", "Installation", "installed", "setup"]

_JSON: Final = ["json"]
_CONSUMER: Final = "outbox.celery.consumer:Consumer"


@dataclass(frozen=True)
class Installation:
    """What `setup` made of an app."""

    service: Service
    database: str | URL | Engine
    settings: ReceiveSettings
    sweep: SweepSettings
    receiver: Receiver
    queue_type: QueueType
    allow_eager: bool

    @property
    def queue(self) -> Any:
        """The service's queue as the broker should have it, bound to what handlers take now."""
        return kombu_queue(Topology.of(self.service, queue_type=self.queue_type))


_installations: WeakKeyDictionary[Celery, Installation] = WeakKeyDictionary()


def setup(
    app: Celery,
    service: Service,
    *,
    database_url: str | URL | None = None,
    engine: Engine | None = None,
    settings: ReceiveSettings | None = None,
    sweep: SweepSettings | None = None,
    queue_type: QueueType = "quorum",
    events_only: bool = False,
    allow_eager: bool = False,
) -> ReceiveTask:
    """Let *app*'s workers handle the events of *service*; returns the task that does.

    Either *database_url* or *engine* says where the service's tables are; each worker process
    connects by itself. *queue_type* is for RabbitMQ. *events_only*: consume nothing but the
    service's queue, so not the app's default queue either. *allow_eager* is for tests. Only JSON is
    accepted by the app from then on. Raises `ConfigurationError`, here or when the worker starts.
    """
    if app in _installations:
        raise ConfigurationError(
            f"app {app.main!r} serves {_installations[app].service} already: one service per app"
        )
    database = engine if engine is not None else database_url
    if database is None or (engine is not None and database_url is not None):
        raise ConfigurationError("setup() needs either database_url or engine")
    settings = settings or ReceiveSettings()
    receiver = Receiver(
        service,
        ForkSafeEngine(database, name=f"outbox {service.name}"),
        settings,
        interrupts=(SoftTimeLimitExceeded,),
    )
    installation = Installation(
        service, database, settings, sweep or SweepSettings(), receiver, queue_type, allow_eager
    )
    _installations[app] = installation
    _when_configured(app, lambda: _configure(app, installation, events_only))
    app.steps["worker"].add(SweeperStep)
    return _register_task(app, receiver, allow_eager)


def installed(app: Celery) -> Installation:
    """What `setup` made of *app*. Raises `ConfigurationError` where it was not called."""
    try:
        return _installations[app]
    except KeyError:
        raise ConfigurationError(
            f"app {app.main!r} serves no service: call outbox.celery.setup(app, service, ...)"
        ) from None


def _register_task(app: Celery, receiver: Receiver, allow_eager: bool) -> ReceiveTask:
    task = ReceiveTask()
    task.receiving = receiver
    task.allow_eager = allow_eager
    registered: ReceiveTask = app.register_task(task)
    return registered


def _when_configured(app: Celery, configure: Callable[[], None]) -> None:
    """Now, or as soon as the app has read its configuration, which would override ours."""
    if app.configured:  # type: ignore[attr-defined]
        configure()
    else:
        app.on_after_configure.connect(lambda **_: configure(), weak=False)


def _configure(app: Celery, installation: Installation, events_only: bool) -> None:
    conf = app.conf
    conf.accept_content = _JSON
    conf.task_serializer = conf.event_serializer = conf.result_serializer = "json"
    conf.worker_consumer = _CONSUMER
    if conf.broker_connection_retry_on_startup is None:
        conf.broker_connection_retry_on_startup = True
    others = [] if events_only else _other_queues(app)
    conf.task_queues = [*others, installation.queue]


def _other_queues(app: Celery) -> list[Any]:
    given = app.conf.task_queues
    if not given:
        given = app.amqp.Queues([])  # the default queue, as Celery would make it
    return list(given.values() if hasattr(given, "values") else given)


@signals.worker_init.connect
def _prepare_worker(sender: Any, **_: Any) -> None:
    app = sender.app
    installation = _installations.get(app)
    if installation is None:
        return
    _refuse_settings(app, installation)
    queues, name = app.amqp.queues, installation.service.queue
    if name in queues.consume_from:
        # Anew: by now all modules are imported, and with them all handlers.
        queues.select_add(installation.queue)


def _refuse_settings(app: Celery, installation: Installation) -> None:
    if app.conf.task_always_eager and not installation.allow_eager:
        raise ConfigurationError(
            "task_always_eager is on: nothing would reach a queue; turn it off"
        )
    if set(app.conf.accept_content) - {"json", "application/json"}:
        raise ConfigurationError(
            f"accept_content is {app.conf.accept_content}: only JSON is accepted by workers of "
            "events; whoever can write to the queue could otherwise run code here"
        )
    if app.conf.worker_consumer != _CONSUMER:
        raise ConfigurationError(
            f"worker_consumer is {app.conf.worker_consumer!r}: Celery's own discards what it "
            "cannot read; leave it as outbox.celery.setup() set it"
        )
