"""`outbox audit` of several sources and several subscribers, each in a database of its own, in one call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import outbox
from outbox import subscriptions
from outbox.buses.base import OutgoingMessage
from outbox.cli import main
from outbox.receive import Receiver
from outbox.relay import Relay, RelaySettings
from outbox.service import Service
from tests.losing import Made, Sold, Wire, number_of, registry
from tests.workers import eventually

Row = tuple[str | None, str, str]
"""A line of the audit: the source's database, the handler, the type."""


class Subscriber:
    """A service that writes down the numbers of the events it is given."""

    def __init__(self, name: str, engine: Engine, *takes: type) -> None:
        self.engine = engine
        self.service = Service(name, registry=registry)
        self.service.on(*takes, name=f"{name}.count")(self._count)
        self.lost_on_the_way: set[int] = set()
        """Their numbers; what is sent once more comes through."""
        self.given: list[int] = []
        self._receiver = Receiver(self.service, engine)
        with Session(engine) as session, session.begin():
            session.execute(text("CREATE TABLE effect (number int)"))
            subscriptions.note(session, self.service)

    @staticmethod
    def _count(event: Any, session: Session) -> None:
        session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": event.number})

    def hand(self, message: OutgoingMessage) -> None:
        number = number_of(message)
        if number is None or message.type not in self.service.bindings:
            return
        if message.queue is None and number in self.lost_on_the_way:
            return
        self.given.append(number)
        self._receiver.receive(message.body, key_seq=message.key_seq)

    @property
    def effects(self) -> list[int]:
        with Session(self.engine) as session:
            return list(session.scalars(text("SELECT number FROM effect ORDER BY number")))


class Town:
    """Two sources with a relay each, and two subscribers to both."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.sources = [make(), make()]
        for engine in self.sources:  # copies of one template have one log
            with engine.begin() as connection:
                connection.execute(text("UPDATE outbox.outbox_log SET id = gen_random_uuid()"))
        self.stock = Subscriber("stock", make(), Made, Sold)
        self.sales = Subscriber("sales", make(), Sold)
        self.subscribers = [self.stock, self.sales]
        self.ids: dict[int, str] = {}
        """Of each event, by its number."""

    def publish(self, source: int, cls: type, numbers: range) -> None:
        with Session(self.sources[source]) as session, session.begin():
            events = [cls(number, number % 7) for number in numbers]
            ids = outbox.publish_all(session, events, registry=registry)
        self.ids |= dict(zip(numbers, map(str, ids), strict=True))

    @contextmanager
    def relaying(self) -> Iterator[None]:
        """Without rolls: nobody but the audit notices what is missing."""
        with ExitStack() as stack:
            for engine in self.sources:
                relay = Relay(engine.url, Wire(self._route), settings=RelaySettings(rolls=None))
                thread = threading.Thread(target=relay.run)
                thread.start()
                stack.callback(thread.join, 30)
                stack.callback(relay.stop)
            yield

    def _route(self, message: OutgoingMessage) -> None:
        for subscriber in self.subscribers:
            if message.queue in (None, subscriber.service.queue):
                subscriber.hand(message)

    def until_given(self, stock: int, sales: int) -> None:
        eventually(
            lambda: (len(self.stock.given), len(self.sales.given)) == (stock, sales),
            explain=lambda: [one.given for one in self.subscribers],
        )

    def audit(self, *options: str) -> Result:
        arguments = ["audit", "--settle", "0", *options]
        for engine in self.sources:
            arguments += ["--source", url(engine)]
        for subscriber in self.subscribers:
            arguments += ["--subscriber", url(subscriber.engine)]
        return CliRunner(env={"OUTBOX_SCHEMA": None}).invoke(main, arguments)

    def lines(self, *options: str) -> dict[Row, dict[str, Any]]:
        lines = json.loads(self.audit("--json", *options).stdout)["lines"]
        return {(line["source"], line["handler"], line["type"]): line for line in lines}

    def row(self, source: int, handler: str, type: str) -> Row:
        return self.sources[source].url.database, handler, type


def url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture
def town(make_migrated_database: Callable[[], str], make_engine: Callable[..., Engine]) -> Town:
    """Each source has made 20 things and sold 20: the first from 0 on, the second from 100 on. Some
    were lost on their way to one subscriber, and had by the other."""
    town = Town(lambda: make_engine(make_migrated_database()))
    town.stock.lost_on_the_way = {1, 2, 21, 101}
    town.sales.lost_on_the_way = {*range(20, 35), 130}
    with town.relaying():
        for source in (0, 1):
            town.publish(source, Made, range(100 * source, 100 * source + 20))
            town.publish(source, Sold, range(100 * source + 20, 100 * source + 40))
        town.until_given(stock=80 - 4, sales=40 - 16)
    return town


def missing_by_row(town: Town) -> dict[Row, list[int]]:
    """What was lost, as the fixture has it."""
    return {
        town.row(0, "stock.count", "thing.made"): [1, 2],
        town.row(0, "stock.count", "thing.sold"): [21],
        town.row(0, "sales.count", "thing.sold"): list(range(20, 35)),
        town.row(1, "stock.count", "thing.made"): [101],
        town.row(1, "stock.count", "thing.sold"): [],
        town.row(1, "sales.count", "thing.sold"): [130],
    }


def test_each_subscriber_is_compared_with_each_source(town: Town) -> None:
    lines = town.lines()
    assert {row: (line["due"], line["missing"]) for row, line in lines.items()} == {
        row: (20, len(numbers)) for row, numbers in missing_by_row(town).items()
    }
    assert len({line["log"] for line in lines.values()}) == 2


def test_the_first_ten_of_a_line_are_named_and_all_of_them_when_asked(town: Town) -> None:
    expected = {
        row: [town.ids[number] for number in numbers]
        for row, numbers in missing_by_row(town).items()
    }
    assert {row: line["first"] for row, line in town.lines("--all").items()} == expected
    assert {row: line["first"] for row, line in town.lines().items()} == {
        row: ids[:10] for row, ids in expected.items()
    }


def test_the_table_stays_short_and_says_how_to_have_the_rest(town: Town) -> None:
    lost = {number for numbers in missing_by_row(town).values() for number in numbers}
    short = town.audit()
    assert short.exit_code == 1
    assert "--all names every one" in short.stdout
    assert sum(town.ids[number] in short.stdout for number in lost) == 5, "the first of each line"
    whole = town.audit("--all")
    assert whole.exit_code == 1
    named = {line.partition("  ")[0] for line in whole.stdout.splitlines()} & {*town.ids.values()}
    assert named == {town.ids[number] for number in lost}
    assert f"{town.ids[130]}  thing.sold  sales.count  {town.sources[1].url.database}" in (
        whole.stdout
    )


def test_a_repair_sends_each_subscriber_what_it_misses_and_nothing_else(town: Town) -> None:
    assert town.audit("--repair").exit_code == 1
    for subscriber in town.subscribers:
        subscriber.given.clear()
    with town.relaying():
        town.until_given(stock=4, sales=16)
    assert sorted(town.stock.given) == sorted(town.stock.lost_on_the_way)
    assert sorted(town.sales.given) == sorted(town.sales.lost_on_the_way)
    everything = [*range(40), *range(100, 140)]
    assert town.stock.effects == everything
    assert town.sales.effects == [number for number in everything if number % 100 >= 20]
    whole = town.audit()
    assert (whole.exit_code, "Nothing is missing" in whole.stdout) == (0, True), whole.output
