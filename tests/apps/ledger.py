"""A service for worker tests that books what is moved, in order: each event in a transaction that it writes down.

What it is called and connected to comes from the environment; which bookings fail, from the table `refused`.
"""

from __future__ import annotations

import os
from datetime import timedelta

from celery import Celery
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox.celery import setup
from outbox.events import Registry
from outbox.service import RetryPolicy, Service
from outbox.sweeper import SweepSettings

NAME = os.environ.get("LEDGER_NAME", "ledger")
TABLES = """
CREATE TABLE booking (at bigint GENERATED ALWAYS AS IDENTITY, account text, amount int, xid xid8);
CREATE TABLE refused (account text, amount int)
"""
registry = Registry()


@registry.event("money.moved", key="account", ordered=True)
class Moved(BaseModel):
    account: str
    amount: int


@registry.event("money.counted", key="account")
class Counted(BaseModel):
    """As `Moved`, without an order."""

    account: str
    amount: int


service = Service(
    NAME,
    registry=registry,
    exchange=os.environ.get("LEDGER_EXCHANGE", "events"),
    retry=RetryPolicy(attempts=2, first=timedelta(0), cap=timedelta(0)),
)
app = Celery(NAME, broker=os.environ.get("LEDGER_BROKER", "memory://"))
app.conf.task_default_queue = f"{NAME}.tasks"
setup(
    app,
    service,
    database_url=os.environ.get("LEDGER_DATABASE", "postgresql://"),
    queue_type="classic",
    sweep=SweepSettings(longest=timedelta(milliseconds=200), resend_after=timedelta(seconds=1)),
)


@service.on(Moved, Counted, name=f"{NAME}.book")
def book(event: Moved | Counted, session: Session) -> None:
    values = {"account": event.account, "amount": event.amount}
    refused = "SELECT 1 FROM refused WHERE account = :account AND amount = :amount"
    if session.execute(text(refused), values).first():
        raise ValueError(f"{event.account} {event.amount} is refused")
    booking = "INSERT INTO booking (account, amount, xid) VALUES (:account, :amount, pg_current_xact_id())"
    session.execute(text(booking), values)
