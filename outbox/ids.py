"""Event ids: UUIDv7, made in the client, so that ids sort by time and inbox partitions can be dropped by age."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from uuid import UUID

if sys.version_info >= (3, 14):
    from uuid import uuid7 as _uuid7

    def new_id() -> UUID:
        """A new UUIDv7."""
        return _uuid7()
else:
    from uuid_utils.compat import uuid7 as _uuid7

    def new_id() -> UUID:
        """A new UUIDv7."""
        return _uuid7()


def created_at(event_id: UUID) -> datetime | None:
    """The time inside a UUIDv7 (millisecond precision, UTC).

    None for a UUID of another version, and for a time after the year 9999: ids come from outside.
    """
    if event_id.version != 7:
        return None
    try:
        return datetime.fromtimestamp((event_id.int >> 80) / 1000, tz=UTC)
    except (ValueError, OverflowError):
        return None
