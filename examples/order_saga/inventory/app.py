"""Inventory's worker: `celery -A examples.order_saga.inventory.app worker`."""

from __future__ import annotations

import os

from celery import Celery

from examples.order_saga.inventory.service import inventory
from outbox.celery import setup

broker_url = os.environ["OUTBOX_BROKER_URL"]

app = Celery("inventory", broker=broker_url)
app.conf.worker_prefetch_multiplier = 1
if broker_url.startswith("redis"):
    # Redis cannot tell that a worker died; what it had in hand is given out again after this.
    seconds = int(os.environ.get("REDIS_VISIBILITY_TIMEOUT", "600"))
    app.conf.broker_transport_options = {"visibility_timeout": seconds}
setup(app, inventory, database_url=os.environ["OUTBOX_DATABASE_URL"], events_only=True)
