"""What only these tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine

from tests.databases import Databases
from tests.installed import Installed, install
from tests.servers import Room


@pytest.fixture(scope="session")
def installed(room: Room) -> Installed:
    """This tree as a user has it: built as a wheel and installed, once per session."""
    made = room.once("installed", lambda: str(install(room.path / "installed").directory))
    return Installed(Path(made))


@pytest.fixture(scope="module")
def shared_engine(databases: Databases) -> Iterator[Engine]:
    """One database for all tests of a module, each of which looks at what is its own only."""
    url = databases.create_migrated()
    engine = create_engine(url)
    yield engine
    engine.dispose()
    databases.drop(url)
