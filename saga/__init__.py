"""Choreographed sagas without a coordinator: each ends completed, or undone, or stuck and says why.

Names are loaded when first used, so that importing the package is quick and reads no configuration.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saga.context import CurrentSaga, current
    from saga.errors import (
        AlreadyStarted,
        Changed,
        Held,
        IllegalTransition,
        InvalidDeadline,
        NoCompensation,
        OutsideSaga,
        Refused,
        SagaDecided,
        SagaError,
        UndeclaredEvent,
        Unknown,
    )
    from saga.participant import Participant
    from saga.reaction import Reject

_HOMES = {
    "saga.context": ("CurrentSaga", "current"),
    "saga.errors": (
        "AlreadyStarted", "Changed", "Held", "IllegalTransition", "InvalidDeadline", "NoCompensation",
        "OutsideSaga", "Refused", "SagaDecided", "SagaError", "UndeclaredEvent", "Unknown",
    ),
    "saga.participant": ("Participant",),
    "saga.reaction": ("Reject",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AlreadyStarted", "Changed", "CurrentSaga", "Held", "IllegalTransition", "InvalidDeadline", "NoCompensation",
    "OutsideSaga", "Participant", "Refused", "Reject", "SagaDecided", "SagaError", "UndeclaredEvent", "Unknown",
    "current",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module 'saga' has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
