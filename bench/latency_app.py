"""What the figures of latency run: a handler and a Celery task that write down when they began."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psycopg
from celery import Celery
from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox.celery import setup
from outbox.events import Registry
from outbox.service import Service

DATABASE_URL = os.environ["BENCH_DATABASE_URL"]
BROKER_URL = os.environ["BENCH_BROKER_URL"]
CONNINFO = DATABASE_URL.replace("postgresql+psycopg://", "postgresql://")
BEGAN = "INSERT INTO bench_began (number, at) VALUES (:number, :at)"

registry = Registry()


@registry.event("bench.tick")
@dataclass(frozen=True)
class Tick:
    number: int


@registry.event("bench.probed")
@dataclass(frozen=True)
class Probed:
    """What no handler takes: it is only to be seen on its way."""

    number: int


service = Service("bench_latency", registry=registry, exchange="bench_latency")
app = Celery("bench_latency", broker=BROKER_URL)
setup(app, service, database_url=DATABASE_URL, events_only=True)


@service.on(Tick)
def tick(event: Tick, session: Session) -> None:
    at = time.time()
    session.execute(text(BEGAN), {"number": event.number, "at": at})


plain = Celery("bench_latency_plain", broker=BROKER_URL)
plain.conf.task_acks_late = True
plain.conf.task_ignore_result = True
plain.conf.task_default_queue = "bench_latency_plain"
_connections: list[psycopg.Connection[tuple[object, ...]]] = []


@plain.task(name="bench.tick")
def tick_plain(number: int) -> None:
    at = time.time()
    if not _connections:
        _connections.append(psycopg.connect(CONNINFO, autocommit=True))
    _connections[0].execute("INSERT INTO bench_began (number, at) VALUES (%s, %s)", (number, at))
