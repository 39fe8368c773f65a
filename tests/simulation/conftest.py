from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What a simulated worker says when it is killed interests nobody."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
