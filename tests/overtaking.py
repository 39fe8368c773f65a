"""Another thread that gets a connection's lock just before it is taken here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg


def overtake(connection: psycopg.Connection[Any], first: Callable[[], object]) -> None:
    """Whoever takes the lock of *connection* next finds that *first* was done between wanting it and having it."""
    real = connection.lock

    class Overtaken:
        def __enter__(self) -> None:
            connection.lock = real
            first()
            real.__enter__()

        def __exit__(self, *args: Any) -> None:
            real.__exit__(*args)

    connection.lock = Overtaken()  # type: ignore[assignment]
