"""What the figures of receiving run: one row written for each event, by a handler and by a Celery task."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu import Queue
from sqlalchemy import column, create_engine, insert, text
from sqlalchemy import table as sql_table
from sqlalchemy.orm import Session

from outbox.celery import setup
from outbox.events import Registry
from outbox.service import Service

DATABASE_URL = os.environ["BENCH_DATABASE_URL"]
BROKER_URL = os.environ["BENCH_BROKER_URL"]
WRITE = text("INSERT INTO bench_received (customer, filler) VALUES (:customer, :filler)")
WRITE_ALL = insert(sql_table("bench_received", column("customer"), column("filler")))

registry = Registry()


@registry.event("bench.received")
@dataclass(frozen=True)
class Received:
    customer: int
    filler: str


def _service(name: str) -> tuple[Celery, Service]:
    service = Service(name, registry=registry, exchange="bench_receive")
    app = Celery(name, broker=BROKER_URL)
    setup(app, service, database_url=DATABASE_URL, events_only=True)
    return app, service


each, _each = _service("bench_each")
whole, _whole = _service("bench_whole")


@_each.on(Received)
def write(event: Received, session: Session) -> None:
    session.execute(WRITE, {"customer": event.customer, "filler": event.filler})


@_whole.on_batch(Received)
def write_all(events: list[Received], session: Session) -> None:
    session.execute(
        WRITE_ALL, [{"customer": event.customer, "filler": event.filler} for event in events]
    )


def plain_app(broker_url: str) -> Celery:
    """A Celery app of the control, whose queue is as durable as ours."""
    app = Celery("plain", broker=broker_url)
    app.conf.task_acks_late = True
    app.conf.task_ignore_result = True
    app.conf.task_default_queue = "bench_plain"
    app.conf.task_queues = [
        Queue(
            "bench_plain",
            routing_key="bench_plain",
            queue_arguments={"x-queue-type": "quorum"} if broker_url.startswith("amqp") else None,
        )
    ]
    return app


plain = plain_app(BROKER_URL)
_engines: list[Any] = []


@plain.task(name="bench.write")
def write_plain(customer: int, filler: str) -> None:
    if not _engines:
        _engines.append(create_engine(DATABASE_URL))
    with Session(_engines[0]) as session, session.begin():
        session.execute(WRITE, {"customer": customer, "filler": filler})
