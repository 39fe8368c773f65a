"""The same four steps as a DBOS workflow: a control for the figures of sagas, where DBOS is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import URL, create_engine, text

from bench.figures import Timer
from bench.publishing import conninfo

IS_INSTALLED = find_spec("dbos") is not None


class Refused(Exception):
    """The last step says no."""


@contextmanager
def workflows(database: URL, sagas: int) -> Iterator[Callable[[bool], Callable[[Timer], None]]]:
    """What makes a measured run of workflows, that fail in the last step or not."""
    dbos: Any = import_module("dbos").DBOS
    url = database.set(drivername="postgresql", database="bench_dbos")
    with psycopg.connect(conninfo(database), autocommit=True) as connection:
        connection.execute("CREATE DATABASE bench_dbos")
    engine = create_engine(database, pool_size=8)

    def execute(sql: str, **values: object) -> None:
        with engine.begin() as connection:
            connection.execute(text(sql), values)

    @dbos.step()
    def write(run: str, step: int, fails: bool) -> None:
        if fails:
            raise Refused
        execute("INSERT INTO bench_effect (run, step) VALUES (:run, :step)", run=run, step=step)

    @dbos.step()
    def undo(run: str, step: int) -> None:
        execute("DELETE FROM bench_effect WHERE run = :run AND step = :step", run=run, step=step)

    @dbos.workflow()
    def whole(run: str, fails: bool) -> None:
        done = []
        try:
            for step in (1, 2, 3, 4):
                write(run, step, fails and step == 4)
                done.append(step)
        except Refused:
            for step in reversed(done):
                undo(run, step)

    dbos(config={"name": "bench", "system_database_url": url.render_as_string(hide_password=False)})
    dbos.launch()

    def measured(timer: Timer, *, fails: bool) -> None:
        with timer.counting(sagas):
            handles = [dbos.start_workflow(whole, str(uuid4()), fails) for _ in range(sagas)]
            for handle in handles:
                handle.get_result()

    try:
        yield lambda fails: lambda timer: measured(timer, fails=fails)
    finally:
        dbos.destroy()
        engine.dispose()
