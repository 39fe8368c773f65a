"""How things stand, as Prometheus metrics: what `outbox status` says, read anew at each scrape.

    from prometheus_client import REGISTRY
    REGISTRY.register(StandingCollector(engine))

Needs the extra `metrics`. One process for each database is enough: every figure is of the whole schema. Without a
database a scrape still answers, with `outbox_up 0`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from outbox.sql import DEFAULT_SCHEMA
from outbox.status import Standing, read_standing

if TYPE_CHECKING:
    from sqlalchemy import Engine

log = logging.getLogger(__name__)

Samples = Iterable[tuple[Sequence[str], float]]


class StandingCollector(Collector):
    """Reads how things stand in one schema whenever it is asked."""

    def __init__(self, engine: Engine, schema: str = DEFAULT_SCHEMA) -> None:
        self._engine = engine
        self._schema = schema

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering it asks no database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        try:
            with self._engine.connect() as connection:
                standing = read_standing(connection, self._schema)
        except SQLAlchemyError as error:
            log.warning("how schema %s stands could not be read: %s", self._schema, error)
            yield _gauge("up", "Whether the database could be read.", [], [((), 0)])
            return
        yield _gauge("up", "Whether the database could be read.", [], [((), 1)])
        for name, help, labels, samples in _METRICS:
            yield _gauge(name, help, labels, samples(standing))


_METRICS: Sequence[tuple[str, str, Sequence[str], Callable[[Standing], Samples]]] = (
    (
        "waiting_events", "Committed events not known to be with the broker, up to 100,000 a lane.", ["lane"],
        lambda now: [((str(lane.lane),), lane.waiting) for lane in now.lanes],
    ),
    (
        "oldest_waiting_seconds", "How long the oldest of them has waited; 0 where none waits.", [],
        lambda now: [((), _seconds(now.oldest))],
    ),
    ("relays", "Relays alive that hold a lane.", [], lambda now: [((), len(now.relays))]),
    (
        "lanes_without_relay", "Lanes that no relay alive holds.", [],
        lambda now: [((), sum(not lane.relay_alive for lane in now.lanes))],
    ),
    (
        "owed_deliveries", "Deliveries that will be tried again.", ["service", "reason"],
        lambda now: [((one.service, one.reason), one.deliveries) for one in now.pending],
    ),
    (
        "due_deliveries", "Those of them whose time has come.", ["service", "reason"],
        lambda now: [((one.service, one.reason), one.due) for one in now.pending],
    ),
    (
        "dead_letters", "Deliveries that a handler failed for good.", ["service", "handler"],
        lambda now: [((one.service, one.handler), one.letters) for one in now.dead],
    ),
    (
        "quarantined_messages", "Messages that no handler could be given.", ["service"],
        lambda now: [((one.service,), one.messages) for one in now.quarantined],
    ),
    (
        "missing_events", "Events that their source sent, that never came and are asked for.", ["service", "type"],
        lambda now: [((one.service, one.type), one.holes) for one in now.missing],
    ),
    (
        "gone_events", "Events that never came and that their source has dropped from its log.", ["service", "type"],
        lambda now: [((one.service, one.type), one.gone) for one in now.missing],
    ),
    (
        "oldest_missing_seconds", "How long the first of those has been missed.", ["service", "type"],
        lambda now: [((one.service, one.type), _seconds(one.oldest)) for one in now.missing],
    ),
)  # fmt: skip


def _gauge(name: str, help: str, labels: Sequence[str], samples: Samples) -> Metric:
    family: Any = GaugeMetricFamily(f"outbox_{name}", help, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    metric: Metric = family
    return metric


def _seconds(since: timedelta | None) -> float:
    return 0.0 if since is None else since.total_seconds()
