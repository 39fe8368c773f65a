"""Where a simulation's decisions come from: a seed, or the record of an earlier run.

Every decision is a number below the count of what is possible, and 0 is always the undramatic one: go on with whoever
runs, deliver in order, let nothing break. So a schedule is a list of numbers, one that has been cut short goes on
undramatically, and shrinking is making numbers zero and leaving numbers out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol


class Choices(Protocol):
    """Decides, and remembers what it decided."""

    made: list[int]

    def pick(self, count: int, dull: float = 0.0) -> int:
        """A number below *count*; 0 with probability *dull* more than its share."""


class Seeded:
    """Decisions drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)  # noqa: S311 - a schedule, not a secret
        self.made: list[int] = []

    def pick(self, count: int, dull: float = 0.0) -> int:
        choice = 0 if count <= 1 or self._random.random() < dull else self._random.randrange(count)
        self.made.append(choice)
        return choice


class Replayed:
    """Decisions of an earlier run; undramatic ones after its end."""

    def __init__(self, decisions: Sequence[int]) -> None:
        self._decisions = decisions
        self.made: list[int] = []

    def pick(self, count: int, dull: float = 0.0) -> int:  # noqa: ARG002 - decided already
        at = len(self.made)
        choice = min(self._decisions[at], count - 1) if at < len(self._decisions) else 0
        self.made.append(choice)
        return choice


def shrink(
    decisions: Sequence[int], fails: Callable[[Sequence[int]], bool], budget: int = 400
) -> list[int]:
    """A shorter, calmer list of decisions that still *fails*; at most *budget* runs are spent on it.

    Cuts the end off, then leaves out ever smaller pieces, then makes decisions 0 (delta debugging, Zeller 1999).
    """
    best = _without_dull_end(decisions)
    spent = 0

    def still(candidate: list[int]) -> bool:
        nonlocal spent
        spent += 1
        return spent <= budget and fails(candidate)

    piece = max(len(best) // 2, 1)
    while piece >= 1 and spent < budget:
        at = 0
        while at < len(best) and spent < budget:
            without = _without_dull_end([*best[:at], *best[at + piece :]])
            zeroed = _without_dull_end(
                [*best[:at], *[0] * len(best[at : at + piece]), *best[at + piece :]]
            )
            if len(without) < len(best) and still(without):
                best = without
            elif zeroed != best and still(zeroed):
                best = zeroed
                at += piece
            else:
                at += piece
        piece //= 2
    return best


def _without_dull_end(decisions: Sequence[int]) -> list[int]:
    end = len(decisions)
    while end and decisions[end - 1] == 0:
        end -= 1
    return list(decisions[:end])
