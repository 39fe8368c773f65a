"""A service with a queue on each broker, for a whole file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.databases import Databases
from tests.servers import Room, Unavailable
from tests.workers import Billing


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest, room: Room) -> str:
    try:
        return room.url(request.param)
    except Unavailable as unavailable:
        pytest.skip(f"no server: {unavailable}")


@pytest.fixture(scope="module")
def billing(
    broker_url: str, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Billing]:
    database_url = databases.create_migrated()
    billing = Billing(database_url, broker_url, tmp_path_factory.mktemp("billing"))
    yield billing
    billing.close()
    databases.drop(database_url)
