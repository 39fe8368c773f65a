"""Events that no queue is bound to: legal, and perhaps not meant. Counted, and said once per type."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

log = logging.getLogger(__name__)

_MOST_TYPES: Final = 1_000


class Unrouted(Counter[str]):
    """How many events of each type went nowhere since the bus was opened."""

    def __init__(self, exchange: str = "") -> None:
        super().__init__()
        self._exchange = exchange

    def note(self, event_type: str, count: int, why: str = "no queue is bound to it") -> None:
        """*count* more of *event_type*. The first of a type is logged."""
        if event_type not in self:
            if len(self) >= _MOST_TYPES:
                return
            log.warning(
                "events of type %.100s on exchange %r go nowhere: %s",
                event_type,
                self._exchange,
                why,
            )
        self[event_type] += count
