"""Consumers of events from Kafka: what `outbox.celery` is for brokers that Celery knows.

`outbox consume` runs one as a process; `Consumer` is for programs of your own.
"""

from __future__ import annotations

from outbox.kafka.consumer import Consumer, ConsumerSettings

__all__ = ["Consumer", "ConsumerSettings"]
