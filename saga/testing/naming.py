"""Event ids that do not depend on the course in which an event appears.

An id is made of what the event says, of what was being handled when it was published, and where. So the same event has
the same id and the same bytes in every course, and what a service has stored in one course can go on in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any
from unittest.mock import patch
from uuid import UUID

import outbox.writing
import saga.start
from outbox.payload import write_payload
from outbox.plain import write_plain

_BORN = int(datetime.now(UTC).timestamp() * 1000)
"""The time inside of the ids: of this process, as receivers refuse what is too old or of the future."""


class Naming:
    """Gives out ids, within `applied`."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        """What envelopes say of when they were made."""
        self._cause = ""
        self._content = b""
        self._given: Counter[bytes] = Counter()

    def begin(self, cause: str, now: datetime) -> None:
        """Say what is handled from here on."""
        self._cause, self.now = cause, now
        self._given.clear()

    @contextmanager
    def applied(self) -> Iterator[None]:
        def noting(
            write: Callable[[Any, object], bytes | None],
        ) -> Callable[[Any, object], bytes | None]:
            def written(how: Any, payload: object) -> bytes | None:
                data = write(how, payload)
                if data is not None:
                    self._content = type(payload).__qualname__.encode() + data
                return data

            return written

        def new_id_and_text() -> tuple[UUID, str]:
            event_id = self._id(self._content)
            return event_id, str(event_id)

        def time_ns() -> int:
            return int(self.now.timestamp() * 1_000_000) * 1_000

        with (
            patch.object(outbox.writing, "write_plain", noting(write_plain)),
            patch.object(outbox.writing, "write_payload", noting(write_payload)),
            patch.object(outbox.writing, "new_id_and_text", new_id_and_text),
            patch.object(outbox.writing, "time_ns", time_ns),
            patch.object(saga.start, "new_id", lambda: self._id(b"saga")),
        ):
            yield

    def _id(self, content: bytes) -> UUID:
        # The same said twice is two events.
        self._given[content] += 1
        said = f"{self._cause} {self._given[content]} ".encode() + content
        rest = int.from_bytes(blake2b(said, digest_size=10).digest())
        number = (_BORN << 80) | rest
        number = number & ~(0xF << 76) | 7 << 76
        return UUID(int=number & ~(3 << 62) | 2 << 62)
