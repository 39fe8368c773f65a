"""A service for worker tests: what it is connected to and how it behaves comes from the environment.

What a handler does is written in the event, so that one worker serves many tests.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

from celery import Celery
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox import pending
from outbox.celery import setup
from outbox.context import current
from outbox.events import Registry
from outbox.receive import ReceiveSettings
from outbox.service import Delivery, Handler, RetryPolicy, Service
from outbox.sweeper import SweepSettings
from outbox.work import TransactionLimits

NAME = os.environ.get("BILLING_NAME", "billing")
registry = Registry()


@registry.event("order.placed", key="order")
class Placed(BaseModel):
    order: str
    do: str = ""


@registry.event("order.stepped", key="order", ordered=True)
class Stepped(BaseModel):
    order: str
    step: int
    do: str = ""


service = Service(
    NAME,
    registry=registry,
    exchange=f"{NAME}.exchange",
    retry=RetryPolicy(attempts=3, first=timedelta(milliseconds=50), cap=timedelta(seconds=0.2)),
)
app = Celery(NAME, broker=os.environ.get("BILLING_BROKER", "memory://"))
app.conf.broker_transport_options = {
    # On Redis: how soon what a dead worker held is handed out again.
    "visibility_timeout": float(os.environ.get("BILLING_VISIBILITY", "3600")),
    "unacked_restore_interval": 0.2,
    "unacked_restore_throttle": 1,
    # A worker that is killed while it hands out again what others held keeps them all from it so long.
    "unacked_mutex_expire": 1,
}
app.conf.worker_prefetch_multiplier = 1
# Not `celery`: tests that run at the same time share the broker.
app.conf.task_default_queue = f"{NAME}.tasks"


@app.task(name="billing.other")
def other(order: str) -> None:
    """A task of the app's own, on its default queue."""


setup(
    app,
    service,
    database_url=os.environ.get("BILLING_DATABASE", "postgresql://"),
    events_only=bool(os.environ.get("BILLING_EVENTS_ONLY")),
    queue_type="classic" if os.environ.get("BILLING_QUEUE") == "classic" else "quorum",
    settings=ReceiveSettings(
        patience=timedelta(seconds=float(os.environ.get("BILLING_PATIENCE", "10"))),
        missed_after=timedelta(seconds=float(os.environ.get("BILLING_MISSED_AFTER", "15"))),
        transaction=TransactionLimits(lock=timedelta(seconds=2), lease=timedelta(seconds=1)),
    ),
    sweep=SweepSettings(
        longest=timedelta(milliseconds=200),
        resend_after=timedelta(seconds=1),
        declare_every=timedelta(seconds=float(os.environ.get("BILLING_DECLARE_EVERY", "30"))),
    ),
)


@service.on(Placed, name=f"{NAME}.bill")
def bill(event: Placed, session: Session) -> None:
    write(session, event.order)
    match event.do.split():
        case ["fail"]:
            raise ValueError("told to fail")
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["kill", "once"]:
            if not has_been_here(event.order):
                os.kill(os.getpid(), signal.SIGKILL)
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["later"]:
            handled = current()
            assert handled is not None
            pending.schedule(session, NAME, f"{NAME}.remind", handled.envelope)


@service.on(Stepped, name=f"{NAME}.take_step")
def take_step(event: Stepped, session: Session) -> None:
    """Writes beside each step which one it came after: the last one that had been committed."""
    session.execute(
        text(
            "INSERT INTO step (key, step, after, process) "
            "SELECT :key, :step, coalesce(max(step), 0), :process FROM step WHERE key = :key"
        ),
        {"key": event.order, "step": event.step, "process": os.getpid()},
    )
    what, _, how = event.do.partition(" ")
    if how == "once" and has_been_here(f"{event.order}-{event.step}"):
        return
    match what:
        case "fail":
            raise ValueError("told to fail")
        case "hang":
            time.sleep(600)
        case "sleep":
            time.sleep(float(how))


def remind(delivery: Delivery, session: Session) -> None:
    write(session, f"{delivery.event.order} reminded")


service.add(
    Handler(f"{NAME}.remind", frozenset({"order.placed"}), remind, service.retry, subscribes=False)
)


def write(session: Session, what: str) -> None:
    session.execute(text("INSERT INTO effect VALUES (:what)"), {"what": what})


def has_been_here(order: str) -> bool:
    """A memory outside of the transaction, which the kill takes with it."""
    path = os.path.join(os.environ["BILLING_DIRECTORY"], order)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    return False
