"""A transactional outbox, its relay and an inbox: events that exist exactly if their transaction committed.

Names are loaded when first used, so that importing the package is quick and reads no configuration.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox.doorbell import wake_relays
    from outbox.envelope import Envelope
    from outbox.errors import (
        BusError,
        ConfigurationError,
        InvalidPayload,
        MalformedMessage,
        NotInTransaction,
        OutboxError,
        PayloadTooLarge,
        PublishError,
        SchemaError,
        UnknownEventType,
        UnregisteredEvent,
    )
    from outbox.events import Registry, event, registry, upcast
    from outbox.publishing import apublish, apublish_all, publish, publish_all
    from outbox.service import Delivery, RetryPolicy, Service

_HOMES = {
    "outbox.doorbell": ("wake_relays",),
    "outbox.envelope": ("Envelope",),
    "outbox.errors": (
        "BusError", "ConfigurationError", "InvalidPayload", "MalformedMessage", "NotInTransaction", "OutboxError",
        "PayloadTooLarge", "PublishError", "SchemaError", "UnknownEventType", "UnregisteredEvent",
    ),
    "outbox.events": ("Registry", "event", "registry", "upcast"),
    "outbox.publishing": ("apublish", "apublish_all", "publish", "publish_all"),
    "outbox.service": ("Delivery", "RetryPolicy", "Service"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BusError", "ConfigurationError", "Delivery", "Envelope", "InvalidPayload", "MalformedMessage", "NotInTransaction",
    "OutboxError", "PayloadTooLarge", "PublishError", "Registry", "RetryPolicy", "SchemaError", "Service",
    "UnknownEventType", "UnregisteredEvent", "apublish", "apublish_all", "event", "publish", "publish_all", "registry",
    "upcast", "wake_relays",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module 'outbox' has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
