"""The sweeper as a part of the worker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from celery import bootsteps
from sqlalchemy.exc import DBAPIError

from outbox import idle_keys, inbox_partitions, schema
from outbox.celery.engines import ForkSafeEngine
from outbox.celery.installation import installed
from outbox.celery.own_queue import OwnQueue
from outbox.service import Service
from outbox.sweeper import Sweeper
from outbox.vigil import Vigil

log = logging.getLogger(__name__)


class Look:
    """What the sweeper looks after beside what is due: that the broker has our queue, and what is missed."""

    def __init__(self, vigil: Vigil, declare: Callable[[], None], every: timedelta) -> None:
        self._vigil = vigil
        self._declare = declare
        self._every = every.total_seconds()
        self._declare_at = time.monotonic() + self._every

    def __call__(self) -> None:
        now = time.monotonic()
        if now >= self._declare_at:
            self._declare_at = now + self._every
            self._declare()  # before anything is asked for: the answer needs a queue to come to
        self._vigil.look()


class SweeperStep(bootsteps.StartStopStep):
    """Runs the sweeper in the worker's main process, from when its pool has started."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._sweeper: Sweeper | None = None
        self._queue: OwnQueue | None = None

    def start(self, worker: Any) -> None:
        installation = installed(worker.app)
        service = installation.service
        if service.queue not in worker.app.amqp.queues.consume_from:
            return
        engine = ForkSafeEngine(installation.database, name=f"outbox sweeper {service.name}")
        check_schema(engine, service.schema)
        window = installation.settings.dedupe_window
        self._queue = OwnQueue(worker.app, installation.queue)
        self._sweeper = Sweeper(
            service.name,
            engine,
            self._queue,
            schema=service.schema,
            settings=installation.sweep,
            chores=partial(_keep_up, engine, service, window),
            bell=installation.bell,
            look=Look(
                Vigil(
                    service,
                    engine,
                    self._queue.send_to,
                    patience=installation.settings.missed_after,
                ),
                self._queue.declare,
                installation.sweep.declare_every,
            ),
        )
        self._sweeper.start()

    def stop(self, _worker: Any) -> None:
        sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.stop()
        if self._queue is not None:
            self._queue.close()

    def terminate(self, worker: Any) -> None:
        self.stop(worker)


def check_schema(engine: ForkSafeEngine, name: str) -> None:
    """Raise `SchemaError` unless the tables fit this release. A database that is away is no error."""
    try:
        with engine().connect() as connection:
            schema.check(connection, name)
    except DBAPIError as error:
        log.warning("could not check the tables in schema %s yet: %s", name, error)


def _keep_up(engine: ForkSafeEngine, service: Service, window: timedelta) -> None:
    inbox_partitions.maintain(engine(), window=window, schema=service.schema)
    idle_keys.forget(engine(), window=window, schema=service.schema)
    service.keep_up(engine(), window)
