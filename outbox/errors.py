"""Every exception that this package raises on purpose.

Each message says what is wrong, where, and what to do. A caller who wants one net catches `OutboxError`.
"""

from __future__ import annotations


class OutboxError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(OutboxError):
    """Something is wired wrongly. Raised at import or at start; the text says what to change."""


class SchemaError(ConfigurationError):
    """The tables in the database do not fit this release. Run `outbox migrate`."""


class PublishError(OutboxError):
    """The event was refused at the call, before anything was written. The caller's transaction is intact."""


class UnregisteredEvent(PublishError):
    """The object's class carries no `@event(...)`, or is not in the registry used."""


class InvalidPayload(PublishError):
    """The payload could not be written or could not be read back; the text names the field."""


class PayloadTooLarge(PublishError):
    """The encoded event is over the size limit. Publish a reference to the data instead of the data."""


class NotInTransaction(PublishError):
    """The connection is in autocommit, so the event could not be atomic with the data."""


class MalformedMessage(OutboxError):
    """Bytes that are no readable event: not JSON, no CloudEvents envelope, or over a limit."""


class UnknownEventType(MalformedMessage):
    """A readable envelope whose type or version this service has no class for."""


class BusError(OutboxError):
    """The broker did not take the messages; they stay in the log and are sent again."""


class LeaseLost(OutboxError):
    """Another relay owns the lane now. Nothing to do: what was sent twice is dropped by the inbox."""


def told(error: BaseException) -> str:
    """What a library's *error* says; its kind, where it says nothing."""
    return str(error).strip() or type(error).__name__
