"""What only these tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.installed import Installed, install
from tests.servers import Room


@pytest.fixture(scope="session")
def installed(room: Room) -> Installed:
    """This tree as a user has it: built as a wheel and installed, once per session."""
    made = room.once("installed", lambda: str(install(room.path / "installed").directory))
    return Installed(Path(made))
