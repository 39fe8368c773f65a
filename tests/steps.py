"""Ordered keys end to end: steps published in order, and what the handler in `tests/apps/billing.py` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import outbox
from tests.apps.billing import Stepped, registry
from tests.workers import eventually

KEYS = 12
STEPS = 20
HANGS_AT = 7
"""This step of the first key does not end until its process is killed."""
FAILS_AT = range(3, STEPS, 6)
"""These steps of every key fail the first time."""


class Steps:
    """The steps of some orders, on the database of the service that handles them."""

    def __init__(self, engine: Engine, directory: Path, name: str, seed: int) -> None:
        self._engine = engine
        self._directory = directory
        self._random = Random(seed)
        self.keys = [f"{name}-{number}" for number in range(KEYS)]
        self._published = dict.fromkeys(self.keys, 0)
        with engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE TABLE IF NOT EXISTS step (at bigint GENERATED ALWAYS AS IDENTITY, "
                    "key text, step int, after int, process int)"
                )
            )

    def publish(self, until: int) -> None:
        """The next steps of each key up to that one; a transaction has a few, of one key or several."""
        while unfinished := [key for key, last in self._published.items() if last < until]:
            some = [self._random.choice(unfinished) for _ in range(self._random.randint(1, 5))]
            with Session(self._engine) as session, session.begin():
                events = [event for key in some for event in self._next(key, until)]
                outbox.publish_all(session, events, registry=registry)

    def _next(self, key: str, until: int) -> Iterator[Stepped]:
        if self._published[key] < until:
            self._published[key] += 1
            step = self._published[key]
            yield Stepped(order=key, step=step, do=self._what_to_do(key, step))

    def _what_to_do(self, key: str, step: int) -> str:
        if key == self.keys[0] and step == HANGS_AT:
            return "hang once"
        if step in FAILS_AT:
            return "fail once"
        return f"sleep {self._random.choice((0, 0.005, 0.02))}"

    def has_run(self, key: str, step: int) -> bool:
        """Whether a handler has begun with what it is to do once."""
        return (self._directory / f"{key}-{step}").exists()

    def until_one_hangs(self) -> None:
        eventually(lambda: self.has_run(self.keys[0], HANGS_AT), 30, self.taken)

    def until_all_are_taken(self) -> None:
        wanted = sum(self._published.values())
        eventually(lambda: self.count() >= wanted, 60, self.taken)

    def assert_in_order(self) -> None:
        """Of each key every step once, in order, and each saw that the one before it had been committed."""
        for key, taken in self.taken().items():
            in_order = list(range(self._published[key] + 1))
            assert taken == [(step, before) for before, step in pairwise(in_order)], key
        failing = [(key, step) for key in self.keys for step in FAILS_AT]
        assert all(self.has_run(key, step) for key, step in failing)

    def taken(self) -> dict[str, list[tuple[int, int]]]:
        """By key, each step with the one that it came after, in the order in which they were written."""
        found: dict[str, list[tuple[int, int]]] = {key: [] for key in self.keys}
        for row in self._rows():
            found[row.key].append((row.step, row.after))
        return found

    def count(self) -> int:
        """How many were written."""
        return len(self._rows())

    def processes(self) -> set[int]:
        """Those that have written."""
        return {row.process for row in self._rows()}

    def _rows(self) -> list[Any]:
        sql = text("SELECT * FROM step WHERE key = ANY(:keys) ORDER BY at")
        with self._engine.connect() as connection:
            return list(connection.execute(sql, {"keys": self.keys}))
