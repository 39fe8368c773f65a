"""Celery workers as consumers of events.

    app = Celery("billing", broker="amqp://...")
    setup(app, billing, database_url="postgresql://...")

makes plain `celery -A billing worker` consume the service's queue, bound to the types that its
handlers take. Call it after the handlers are registered, or before: bindings are read when the
worker starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy import URL, Engine

from outbox.bell import Bell
from outbox.buses.topology import QueueType
from outbox.celery.engines import ForkSafeEngine
from outbox.celery.installation import CONSUMER, Installation, install, installed
from outbox.celery.starting import BATCH_OPTION, PrepareStep
from outbox.celery.sweeping import SweeperStep
from outbox.celery.task import TASK_NAME, ReceiveBatchTask, ReceiveTask
from outbox.doorbell import wake_relays
from outbox.errors import ConfigurationError
from outbox.receive import Receiver, ReceiveSettings
from outbox.service import Service
from outbox.sweeper import SweepSettings

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["TASK_NAME", "Installation", "installed", "setup"]

_JSON: Final = ["json"]


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
    wakes_relays: bool = True,
) -> ReceiveTask:
    """Let *app*'s workers handle the events of *service*; returns the task that does.

    Either *database_url* or *engine* says where the service's tables are; each worker process
    connects by itself. *queue_type* is for RabbitMQ. *events_only*: consume nothing but the
    service's queue, so not the app's default queue either. *allow_eager* is for tests.
    *wakes_relays*: each process that publishes wakes the database's relays, for which it has a
    thread and one more connection from its first event on (`outbox.wake_relays`). Only JSON is
    accepted by the app from then on. Raises `ConfigurationError`, here or when the worker starts.
    """
    database = engine if engine is not None else database_url
    if database is None or (engine is not None and database_url is not None):
        raise ConfigurationError("setup() needs either database_url or engine")
    settings = settings or ReceiveSettings()
    bell = Bell()
    receiver = Receiver(
        service,
        ForkSafeEngine(database, name=f"outbox {service.name}"),
        settings,
        interrupts=(SoftTimeLimitExceeded,),
        on_due=bell.ring,
    )
    installation = Installation(
        service,
        database,
        settings,
        sweep or SweepSettings(),
        receiver,
        bell,
        queue_type,
        allow_eager,
    )
    install(app, installation)
    if wakes_relays:
        wake_relays(database)
    _when_configured(app, lambda: _configure(app, installation, events_only))
    app.steps["worker"].update((PrepareStep, SweeperStep))
    app.user_options["worker"].add(BATCH_OPTION)
    return _register_task(app, receiver, allow_eager)


def _register_task(app: Celery, receiver: Receiver, allow_eager: bool) -> ReceiveTask:
    task, batch_task = ReceiveTask(), ReceiveBatchTask()
    task.receiving = batch_task.receiving = receiver
    task.allow_eager = allow_eager
    app.register_task(batch_task)
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
    conf.worker_consumer = CONSUMER
    if conf.broker_connection_retry_on_startup is None:
        conf.broker_connection_retry_on_startup = True
    others = [] if events_only else _other_queues(app)
    conf.task_queues = [*others, installation.queue]


def _other_queues(app: Celery) -> list[Any]:
    given = app.conf.task_queues
    if not given:
        given = app.amqp.Queues([])  # the default queue, as Celery would make it
    return list(given.values() if hasattr(given, "values") else given)
