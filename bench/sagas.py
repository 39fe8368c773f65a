"""Sagas of four steps, from their start until they are settled.

All four are of one participant, on one database, with two worker processes and a relay between each
step and the next. The Celery chain has the same two processes and no guarantee; what is done by hand
hands on in memory and has no broker at all, so it shows what the database allows.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import click
import psycopg
from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session

import saga.schema
from bench import durable
from bench.figures import Figure, Timer
from bench.processes import relay, worker
from bench.publishing import conninfo

NAMES = ("saga of 4 steps, completed", "saga of 4 steps, rejected in the last step")
SAGAS = 300
PROCESSES = 2
BATCH = ("--outbox-batch", "100")
PATIENCE_SECONDS = 120.0
TABLES = """
CREATE TABLE IF NOT EXISTS bench_effect (run text, step int, PRIMARY KEY (run, step));
CREATE TABLE IF NOT EXISTS bench_end (run text PRIMARY KEY);
CREATE TABLE IF NOT EXISTS bench_inbox (id uuid PRIMARY KEY);
CREATE TABLE IF NOT EXISTS bench_outbox (id bigint GENERATED ALWAYS AS IDENTITY, body text)
"""


@contextmanager
def figures(database: URL, broker_url: str) -> Iterator[list[Figure]]:
    """The figures, with their workers and a relay at work while the context is open."""
    with ExitStack() as stack:
        saga.schema.upgrade_engine(create_engine(database))
        with psycopg.connect(conninfo(database), autocommit=True) as connection:
            connection.execute(TABLES)
        os.environ |= {
            "BENCH_DATABASE_URL": database.render_as_string(hide_password=False),
            "BENCH_BROKER_URL": broker_url,
        }
        from bench import saga_app

        two = ("--concurrency", str(PROCESSES))
        theirs = ("-Q", "bench.events", "--hostname", "app@bench")
        stack.enter_context(worker("bench.saga_app:app", *two, *BATCH, *theirs))
        theirs = ("-Q", "bench.plain", "--hostname", "plain@bench")
        stack.enter_context(worker("bench.saga_app:plain", *two, *theirs))
        stack.enter_context(relay(database, broker_url))
        _wait_for_workers(database, saga_app)
        made = []
        workflow = None
        if durable.IS_INSTALLED:
            workflow = stack.enter_context(durable.workflows(database, SAGAS))
        else:
            click.echo("dbos is not installed: sagas are measured without that control", err=True)
        for name, fails in zip(NAMES, (False, True), strict=True):
            ours = _until_ended(database, partial(_start, saga_app, fails=fails))
            plain = _until_ended(database, partial(saga_app.plain_chain, fails=fails))
            by_hand = _by_hand(database, fails=fails)
            made.append(Figure(name, "sagas/s", ours, plain, "a Celery chain, no guarantees", 2))
            made.append(Figure(name, "sagas/s", ours, by_hand, "by hand, in threads", reach=0.5))
            if workflow is not None:
                made.append(Figure(name, "sagas/s", ours, workflow(fails), "a DBOS workflow"))
        yield made


def _wait_for_workers(database: URL, app: Any) -> None:
    """Until a saga and a chain have come to their end: before that, a queue may not be bound yet."""
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        for start in (partial(_start, app, fails=False), partial(app.plain_chain, fails=False)):
            runs: list[str] = []
            while not _ended(connection, runs):
                runs.append(str(uuid4()))
                start(runs[-1])
                time.sleep(0.5)


def _start(app: Any, run: str, *, fails: bool) -> None:
    if not _engines:
        _engines.append(create_engine(app.DATABASE_URL))
    with Session(_engines[0]) as session, session.begin():
        app.bench.start(session, app.REACHED[0](run, fails))


_engines: list[Any] = []


def _until_ended(database: URL, start: Callable[[str], None]) -> Callable[[Timer], None]:
    def measured(timer: Timer) -> None:
        runs = [str(uuid4()) for _ in range(SAGAS)]
        with (
            psycopg.connect(conninfo(database), autocommit=True) as connection,
            timer.counting(SAGAS),
        ):
            for run in runs:
                start(run)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while _ended(connection, runs) < SAGAS:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{SAGAS} sagas have not ended in {PATIENCE_SECONDS} s")
                time.sleep(0.02)

    return measured


def _ended(connection: psycopg.Connection[Any], runs: list[str]) -> int:
    rows = connection.execute("SELECT count(*) FROM bench_end WHERE run = ANY(%s)", (runs,))
    return int(rows.fetchone()[0])  # type: ignore[index]


def _by_hand(database: URL, *, fails: bool) -> Callable[[Timer], None]:
    """Inbox, write and outbox in one transaction for each step, handed on in memory."""
    forth = [("write", step) for step in (1, 2, 3, 4)]
    back = [("write", 1), ("write", 2), ("write", 3), ("refuse", 4), ("undo", 3), ("undo", 2), ("undo", 1)]  # fmt: skip
    path = back if fails else forth

    def measured(timer: Timer) -> None:
        work: queue.Queue[tuple[str, int] | None] = queue.Queue()
        done = threading.Semaphore(0)

        def run() -> None:
            with psycopg.connect(conninfo(database)) as connection:
                while (task := work.get()) is not None:
                    saga_run, at = task
                    _one_step(connection, saga_run, *path[at])
                    if at + 1 < len(path):
                        work.put((saga_run, at + 1))
                    else:
                        done.release()

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        with timer.counting(SAGAS):
            for _ in range(SAGAS):
                work.put((str(uuid4()), 0))
            for _ in range(SAGAS):
                done.acquire()
        for _ in threads:
            work.put(None)
        for thread in threads:
            thread.join()

    return measured


def _one_step(connection: psycopg.Connection[Any], run: str, verb: str, step: int) -> None:
    connection.execute("INSERT INTO bench_inbox (id) VALUES (%s)", (uuid4(),))
    if verb == "write":
        connection.execute("INSERT INTO bench_effect (run, step) VALUES (%s, %s)", (run, step))
    elif verb == "undo":
        connection.execute("DELETE FROM bench_effect WHERE run = %s AND step = %s", (run, step))
    connection.execute("INSERT INTO bench_outbox (body) VALUES (%s)", (run,))
    connection.commit()
