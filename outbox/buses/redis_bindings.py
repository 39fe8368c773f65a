"""The bindings of a virtual topic exchange, as kombu's Redis transport keeps them: a set of (key, pattern, queue).

kombu takes an exchange that its process has not declared for a direct one, and then finds nobody who is bound by a
pattern. Here the patterns always count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from kombu.transport.virtual.exchange import TopicExchange

from outbox.buses.topology import Topology

_SEPARATOR: Final = "\x06\x16"
_MOST_TYPES: Final = 10_000


def table_key(exchange: str) -> str:
    """Where kombu keeps the bindings of *exchange*."""
    return f"_kombu.binding.{exchange}"


def permanent_key(exchange: str) -> str:
    """Where kombu, from 5.7 on, notes the bindings that no expiry of other queues may take along."""
    return f"_kombu.binding_permanent.{exchange}"


def members_of(topology: Topology) -> list[str]:
    """What `topology` puts into the set."""
    pattern_of = TopicExchange(None).key_to_pattern
    return [
        _SEPARATOR.join((event_type, pattern_of(event_type), topology.queue))
        for event_type in topology.bindings
    ]


class Bindings:
    """One reading of an exchange's set."""

    def __init__(self, members: Iterable[bytes] = ()) -> None:
        self.count = 0
        """How many bindings there are."""
        self._bound: list[tuple[str, re.Pattern[str] | None, str]] = []
        self._queues_of: dict[str, tuple[str, ...]] = {}
        for member in sorted(members):
            self.count += 1
            key, _, rest = member.decode().partition(_SEPARATOR)
            pattern, _, queue = rest.rpartition(_SEPARATOR)
            if queue:
                # A binding without a pattern was made by one that took the exchange for a direct one.
                self._bound.append((key, re.compile(pattern) if pattern else None, queue))

    def queues(self, event_type: str) -> tuple[str, ...]:
        """The queues bound to *event_type*, each once."""
        found = self._queues_of.get(event_type)
        if found is None:
            if len(self._queues_of) >= _MOST_TYPES:
                self._queues_of.clear()
            matching = (
                queue
                for key, pattern, queue in self._bound
                if key == event_type or (pattern is not None and pattern.match(event_type))
            )
            found = self._queues_of[event_type] = tuple(dict.fromkeys(matching))
        return found
