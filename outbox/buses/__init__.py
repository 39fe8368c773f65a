"""Brokers: RabbitMQ, Redis and Kafka behind one small interface."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any, Final, NamedTuple

from outbox.buses.base import Bus, Confirmation, OutgoingMessage
from outbox.buses.topology import DEFAULT_EXCHANGE, QueueType, Topology
from outbox.buses.urls import masked
from outbox.errors import ConfigurationError

__all__ = ["Bus", "Confirmation", "OutgoingMessage", "QueueType", "Topology", "masked", "open_bus"]


class _Kind(NamedTuple):
    module: str
    name: str
    extra: str | None
    """The extra of this package that brings the client library; None: it is always there."""


_RABBITMQ: Final = _Kind("outbox.buses.rabbitmq", "RabbitMQBus", None)
_REDIS: Final = _Kind("outbox.buses.redis", "RedisBus", "redis")
_KAFKA: Final = _Kind("outbox.buses.kafka", "KafkaBus", "kafka")
_BUSES: Final = {
    "amqp": _RABBITMQ,
    "amqps": _RABBITMQ,
    "pyamqp": _RABBITMQ,
    "redis": _REDIS,
    "rediss": _REDIS,
    "kafka": _KAFKA,
}


def open_bus(url: str, exchange: str = DEFAULT_EXCHANGE, **options: Any) -> Bus:
    """The bus that *url* names: `amqp(s)://`, `redis(s)://` or `kafka://`. Connects when it is first used.

    For RabbitMQ, several URLs separated by `;` are tried in turn. *options* are those of `RabbitMQBus`, `RedisBus` or
    `KafkaBus`. Raises `ConfigurationError` for a URL or an option that is not known, and where the client library is
    not installed.
    """
    scheme = url.strip().partition("://")[0].lower()
    if scheme not in _BUSES:
        raise ConfigurationError(
            f"{masked(url)!r} names no broker: the URL begins with amqp://, amqps://, redis://, rediss:// or kafka://"
        )
    kind = _BUSES[scheme]
    try:
        make = getattr(import_module(kind.module), kind.name)
    except ModuleNotFoundError as error:
        if kind.extra is None or (error.name or "").startswith("outbox"):
            raise
        raise ConfigurationError(
            f"{scheme}:// needs the package {error.name!r}: pip install 'outbox-saga[{kind.extra}]'"
        ) from error
    unknown = options.keys() - signature(make).parameters.keys()
    if unknown:
        raise ConfigurationError(
            f"{kind.name} has no option {', '.join(sorted(unknown))}: see its documentation"
        )
    opened: Bus = make(url, exchange, **options)
    return opened
