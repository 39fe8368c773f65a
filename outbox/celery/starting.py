"""Before a worker starts: refuse what would lose events, and bind the queue to all handlers.

A bootstep, because Celery swallows what a signal's receiver raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click
from celery import bootsteps

from outbox.celery.compression import bound_decompression
from outbox.celery.installation import CONSUMER, Installation, installed
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery


BATCH_OPTION: Final = click.Option(
    ["--outbox-batch"],
    type=click.IntRange(1, 1_000),
    metavar="N",
    help="Handle up to N events in one transaction (see the guide of outbox); 1 if not given.",
)


class PrepareStep(bootsteps.Step):
    """Runs while the worker is being made. Raises `ConfigurationError`, which ends it."""

    def __init__(self, worker: Any, outbox_batch: int | None = None, **options: Any) -> None:
        super().__init__(worker, **options)
        installation = installed(worker.app)
        installation.batch_size = outbox_batch or 1
        if installation.batch_size > 1:
            # For each process of the pool, a batch in hand and one that is being collected.
            worker.prefetch_multiplier = max(
                worker.prefetch_multiplier, 2 * installation.batch_size
            )
        _refuse_settings(worker.app, installation)
        bound_decompression()
        queues = worker.app.amqp.queues
        if installation.service.queue in queues.consume_from:
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
    if app.conf.worker_consumer != CONSUMER:
        raise ConfigurationError(
            f"worker_consumer is {app.conf.worker_consumer!r}: Celery's own discards what it "
            "cannot read; leave it as outbox.celery.setup() set it"
        )
