"""Named checks of everything that would quietly break a promise, each with what to do about it.

    for finding in examine_database(engine): ...

`outbox doctor` prints them. Checks look and never change anything; each one is on its own, so one
that cannot be made does not hide the others.
"""

from __future__ import annotations

from outbox.doctor.broker import examine_broker
from outbox.doctor.celery_app import examine_app
from outbox.doctor.database import examine_database
from outbox.doctor.finding import Finding, Level, worst

__all__ = [
    "Finding",
    "Level",
    "examine_app",
    "examine_broker",
    "examine_database",
    "worst",
]
