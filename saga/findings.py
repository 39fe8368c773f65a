"""What a check says: which rule, how grave, what is wrong and what to do, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from saga.choreography import Place
from saga.contract import Contract, relative

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One fault."""

    rule: str
    severity: Severity
    message: str
    place: Place | None
    """None where it is not known: a handler that was made by hand."""

    def __str__(self) -> str:
        where = f"{relative(self.place.file)}:{self.place.line}" if self.place else "-"
        return f"{where}: {self.severity} {self.rule}: {self.message}"

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "message": self.message,
            "file": relative(self.place.file) if self.place else None,
            "line": self.place.line if self.place else None,
        }


def error(rule: str, message: str, place: Place | None) -> Finding:
    return Finding(rule, "error", message, place)


def warning(rule: str, message: str, place: Place | None) -> Finding:
    return Finding(rule, "warning", message, place)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Each once; errors first, each kind in the order of the source."""
    return sorted(set(findings), key=_order)


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(one.severity == "error" for one in findings)


def listed(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)


def place_of(contract: Contract) -> Place | None:
    """Where a service's declarations begin; None where that is not known."""
    spec = contract.participant
    places = [one.place for one in spec.starts]
    places += [one.place for one in spec.steps]
    places += [one.place for one in spec.joins]
    plain = (*contract.subscriptions, *contract.publications)
    return min(places or [one.place for one in plain if one.place is not None], default=None)


def _order(one: Finding) -> tuple[Any, ...]:
    place = one.place or Place("\U0010ffff", 0)
    return (one.severity, place, one.rule, one.message)
