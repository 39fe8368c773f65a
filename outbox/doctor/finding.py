"""What a check answers, and how a list of checks is run."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class Level(enum.IntEnum):
    """How bad it is; greater is worse."""

    OK = 0
    WARN = 1
    """Something is lost or late in circumstances that the text names."""
    FAIL = 2
    """A promise does not hold."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    """The check's name: stable, for scripts."""
    level: Level
    found: str
    fix: str = ""
    """What to do; empty where all is well."""


Answer = tuple[Level, str] | tuple[Level, str, str]
Check = tuple[str, Callable[[T], Answer]]


def run(checks: Sequence[Check[T]], patient: T) -> Iterator[Finding]:
    """Make each check on *patient*; one that raises is a failure that says so."""
    for name, check in checks:
        try:
            yield Finding(name, *check(patient))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            yield Finding(
                name,
                Level.FAIL,
                f"could not be checked: {type(error).__name__}: {reason}",
                "see to this first: until then nothing is known here",
            )


def ok(found: str) -> Answer:
    """All is well."""
    return Level.OK, found


def warn(found: str, fix: str) -> Answer:
    """Something is at risk."""
    return Level.WARN, found, fix


def fail(found: str, fix: str) -> Answer:
    """A promise does not hold."""
    return Level.FAIL, found, fix


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them; OK for none."""
    return max((finding.level for finding in findings), default=Level.OK)
