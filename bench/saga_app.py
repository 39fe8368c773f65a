"""What the figures of sagas run: four steps, each of which writes a row, as a saga and as a Celery chain."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from celery import Celery, chain
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from outbox.celery import setup
from outbox.events import Registry
from saga import Participant, Reject, current

DATABASE_URL = os.environ["BENCH_DATABASE_URL"]
BROKER_URL = os.environ["BENCH_BROKER_URL"]
STEPS = 4
WRITE = text("INSERT INTO bench_effect (run, step) VALUES (:run, :step)")
UNDO = text("DELETE FROM bench_effect WHERE run = :run AND step = :step")
END = text("INSERT INTO bench_end (run) VALUES (:run)")


@dataclass(frozen=True)
class Reached:
    """A step was done (0: the saga began)."""

    run: str
    fails: bool


registry = Registry()
bench = Participant("bench", registry=registry)


def _events() -> list[type[Any]]:
    made: list[type[Any]] = []
    for number in range(STEPS + 1):
        event = type(f"Reached{number}", (Reached,), {})
        made.append(registry.event(f"bench.reached{number}", key="run")(event))
    return made


REACHED = _events()


@registry.event("bench.refused", key="run")
class Refused(Reached):
    """The last step said no."""


@bench.compensation(REACHED[0])
def ended_undone(began: Reached, session: Session) -> None:
    session.execute(END, {"run": began.run})


def _declare(number: int) -> None:
    before, after = REACHED[number - 1], REACHED[number]
    is_last = number == STEPS

    @bench.step(
        on=before,
        emits=after,
        rejects=Refused if is_last else None,
        pivot=is_last,
        name=f"step{number}",
    )
    def act(reached: Reached, session: Session) -> Any:
        if is_last and reached.fails:
            raise Reject(Refused(reached.run, reached.fails))
        session.execute(WRITE, {"run": reached.run, "step": number})
        if is_last:
            session.execute(END, {"run": reached.run})
        return after(reached.run, reached.fails)

    if not is_last:

        @act.compensation
        def undo(reached: Reached, _emitted: Reached, session: Session) -> None:
            assert current() is not None
            session.execute(UNDO, {"run": reached.run, "step": number})


for _number in range(1, STEPS + 1):
    _declare(_number)

app = Celery("bench", broker=BROKER_URL)
app.conf.worker_hijack_root_logger = False

plain = Celery("plain", broker=BROKER_URL)
plain.conf.task_default_queue = "bench.plain"
plain.conf.task_ignore_result = True
plain.conf.task_acks_late = True
_engines: list[Any] = []


def _session() -> Session:
    if not _engines:
        _engines.append(create_engine(DATABASE_URL))
    return Session(_engines[0])


@plain.task(name="bench.plain_step")
def plain_step(run: str, step: int, fails: bool) -> None:
    with _session() as session, session.begin():
        if step == STEPS and fails:
            undo = [plain_undo.si(run, one) for one in range(STEPS - 1, 0, -1)]
            chain(*undo, plain_end.si(run)).delay()
            return
        session.execute(WRITE, {"run": run, "step": step})
        if step == STEPS:
            session.execute(END, {"run": run})


@plain.task(name="bench.plain_undo")
def plain_undo(run: str, step: int) -> None:
    with _session() as session, session.begin():
        session.execute(UNDO, {"run": run, "step": step})


@plain.task(name="bench.plain_end")
def plain_end(run: str) -> None:
    with _session() as session, session.begin():
        session.execute(END, {"run": run})


def plain_chain(run: str, *, fails: bool) -> None:
    """Start the chain."""
    chain(*(plain_step.si(run, step, fails) for step in range(1, STEPS + 1))).delay()


setup(app, bench, database_url=DATABASE_URL, events_only=True)
