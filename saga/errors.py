"""What can go wrong in a saga that is not a business answer. A business no is `saga.Reject`."""

from __future__ import annotations

from uuid import UUID

from outbox.errors import ConfigurationError, OutboxError


class SagaError(OutboxError):
    """Base of the errors that the saga runtime raises."""


class OutsideSaga(SagaError):
    """An event without a `sagaid` reached a step or a join. Publish it through `start` or a step."""


class UndeclaredEvent(SagaError):
    """A step returned, rejected with, or was started by an event that its declaration does not name."""


class AlreadyStarted(SagaError):
    """`start` was given the id of a saga that exists. Nothing was written; the transaction is intact.

    For a business command that may arrive twice, this is the answer: the first one started it.
    """

    def __init__(self, saga_id: UUID) -> None:
        super().__init__(f"saga {saga_id} has been started before; this call wrote nothing")
        self.saga_id = saga_id


class SagaDecided(SagaError):
    """A step rejected after the saga had been completed: the decision holds, so the step is stuck.

    The choreography has a rejecting step that the completing join does not wait for.
    """


class NoCompensation(SagaError):
    """A step that was done must be undone, and nobody has said how.

    Give it a compensation or `nothing_to_undo="why"`, deploy, and redrive the dead letter.
    """


class Unknown(SagaError):
    """Raised by the `resolve` hook of an external step: it cannot be told whether the call took effect.

    It is asked again, with backoff; past the last attempt the saga is stuck until a person says.
    """


class Refused(SagaError):
    """A person asked for what would break a promise, or for what is not there. Nothing was done."""


class Held(SagaError):
    """A row is pending for another saga (`saga.isolation`). In a step, turn it into a `Reject`."""

    def __init__(self, what: str, saga_id: UUID) -> None:
        super().__init__(what)
        self.saga_id = saga_id


class Changed(SagaError):
    """What the saga had read is not so any more (`saga.isolation.reread`)."""


class InvalidDeadline(SagaError):
    """A deadline's `at=...` gave no aware datetime; what it counts from was not committed."""


class IllegalTransition(SagaError):
    """The journal was asked for a move that its state machine does not have. A defect of the runtime."""


__all__ = [
    "AlreadyStarted",
    "Changed",
    "ConfigurationError",
    "Held",
    "IllegalTransition",
    "InvalidDeadline",
    "NoCompensation",
    "OutsideSaga",
    "Refused",
    "SagaDecided",
    "SagaError",
    "UndeclaredEvent",
    "Unknown",
]
