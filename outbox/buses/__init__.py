"""Brokers: RabbitMQ, Redis and Kafka behind one small interface."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from outbox.buses.base import Bus, Confirmation, OutgoingMessage
from outbox.buses.topology import DEFAULT_EXCHANGE, QueueType, Topology
from outbox.errors import ConfigurationError

__all__ = ["Bus", "Confirmation", "OutgoingMessage", "QueueType", "Topology", "masked", "open_bus"]

_BUSES = {
    "amqp": ("outbox.buses.rabbitmq", "RabbitMQBus", "rabbitmq"),
    "amqps": ("outbox.buses.rabbitmq", "RabbitMQBus", "rabbitmq"),
    "pyamqp": ("outbox.buses.rabbitmq", "RabbitMQBus", "rabbitmq"),
    "redis": ("outbox.buses.redis", "RedisBus", "redis"),
    "rediss": ("outbox.buses.redis", "RedisBus", "redis"),
    "kafka": ("outbox.buses.kafka", "KafkaBus", "kafka"),
}


def open_bus(url: str, exchange: str = DEFAULT_EXCHANGE, **options: Any) -> Bus:
    """The bus that *url* names: `amqp(s)://`, `redis(s)://` or `kafka://`. Connects when it is first used.

    For RabbitMQ, several URLs separated by `;` are tried in turn. Raises `ConfigurationError` for a scheme that is not
    known, or whose client library is not installed.
    """
    scheme = url.split("://", 1)[0].lower()
    if scheme not in _BUSES:
        raise ConfigurationError(
            f"{masked(url)!r} names no broker: the URL begins with amqp://, amqps://, redis://, rediss:// or kafka://"
        )
    module, name, extra = _BUSES[scheme]
    try:
        bus = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{scheme}:// needs the package {error.name!r}: pip install 'outbox-saga[{extra}]'"
        ) from error
    opened: Bus = bus(url, exchange, **options)
    return opened


def masked(url: str) -> str:
    """*url* without its password, for logs and errors."""
    return ";".join(_masked_one(one) for one in url.split(";"))


def _masked_one(url: str) -> str:
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    user = parts.netloc.rpartition("@")[0].partition(":")[0]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:***@{host}"))
