"""What PostgreSQL's `pg_snapshot` says, read off its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_XID: Final = 3
SERVER: Final = "extract(epoch FROM pg_postmaster_start_time())::text"
"""Which server answers, in SQL: a pooler may put another in its place, and no connection is lost. Positions and xids
that were seen on one mean nothing on the other, should it lack some of what was committed."""
IS_SAME_SERVER: Final = f"{SERVER} = coalesce(%(server)s, {SERVER})"
"""Whether it is `%(server)s` that answers; true where none is given."""
_MOST_LOOKED_AT: Final = 64


@dataclass(frozen=True, slots=True)
class Snapshot:
    """PostgreSQL's `pg_snapshot`: what was committed at one moment."""

    text: str

    @property
    def next(self) -> int:
        """One past the newest transaction that had ended."""
        return int(self.text.split(":")[1])

    @property
    def running(self) -> list[str]:
        """Transactions below `next` that had not ended."""
        listed = self.text.split(":")[2]
        return listed.split(",") if listed else []

    def shows_more_than(self, earlier: Snapshot, own: int) -> bool:
        """Whether a transaction other than *own* may have ended since *earlier*."""
        if self.text == earlier.text:
            return False
        begun = range(earlier.next, self.next)
        if len(begun) > _MOST_LOOKED_AT:
            return True
        ended = {*map(int, earlier.running), *begun} - {*map(int, self.running), own}
        return bool(ended)


NOTHING_SEEN: Final = Snapshot(f"{FIRST_XID}:{FIRST_XID}:")
