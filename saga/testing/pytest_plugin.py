"""Fixtures for pytest, there as soon as outbox-saga is installed.

Define `saga_database` (in conftest.py) as an `Engine`, or a URL, of a PostgreSQL database for tests;
the tables of outbox and saga are made in it where they are missing. Then a test may ask for

- `saga_participant`: `stock = saga_participant(inventory)` runs the handlers of one participant
  while the test plays the others (`saga.testing.alone.Alone`);
- `saga_choreography`: `play = saga_choreography(orders, inventory)` runs several of them in this
  process, without a broker (`saga.testing.choreography.Choreography`).

Nothing is emptied between tests: each has sagas of its own, and what an earlier one left to be done
is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from outbox.service import Service
    from saga.testing.alone import Alone
    from saga.testing.choreography import Choreography

# pytest imports this at each start, so all else is imported where it is used.


@pytest.fixture
def saga_database() -> Engine | str:
    """The database that the saga fixtures work on. To be overridden."""
    pytest.fail(
        "the saga fixtures need a PostgreSQL database: define a fixture `saga_database` in "
        "conftest.py that returns a SQLAlchemy Engine, or a URL, of one for tests",
        pytrace=False,
    )


@pytest.fixture
def saga_engine(saga_database: Engine | str) -> Iterator[Engine]:
    """An engine on `saga_database`."""
    from sqlalchemy import create_engine

    if not isinstance(saga_database, str):
        yield saga_database
        return
    engine = create_engine(saga_database)
    yield engine
    engine.dispose()


@pytest.fixture
def saga_participant(
    saga_engine: Engine, _tables_of: Callable[[Service], None]
) -> Callable[[Service], Alone]:
    """Call it with a participant, or a plain service: an `Alone` with its handlers."""
    from saga.testing.alone import Alone

    def alone(service: Service) -> Alone:
        _tables_of(service)
        return Alone(service, saga_engine)

    return alone


@pytest.fixture
def saga_choreography(
    saga_engine: Engine, _tables_of: Callable[[Service], None]
) -> Callable[..., Choreography]:
    """Call it with participants and services: a `Choreography` of them, sharing the database."""
    from saga.testing.alone import Fresh

    def choreography(*services: Service) -> Choreography:
        for service in services:
            _tables_of(service)
        return Fresh(dict.fromkeys(services, saga_engine))

    return choreography


@pytest.fixture(scope="session")
def _tables_made() -> set[tuple[str, str]]:
    return set()


@pytest.fixture
def _tables_of(
    saga_engine: Engine, _tables_made: set[tuple[str, str]]
) -> Callable[[Service], None]:
    import outbox.schema
    import saga.schema

    def make(service: Service) -> None:
        where = (saga_engine.url.render_as_string(), service.schema)
        if where not in _tables_made:
            outbox.schema.upgrade_engine(saga_engine, service.schema)
            saga.schema.upgrade_engine(saga_engine, service.schema)
            _tables_made.add(where)

    return make
