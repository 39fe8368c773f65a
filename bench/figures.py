"""What a figure is: two things done in turn, several rounds, and the ratio of their medians."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from bench.cpu import read_cpu, spent_since


@dataclass
class Timer:
    """What a thing has done, and the time it took; setting up is not counted."""

    work: float = 0
    seconds: float = 0
    cpu: Counter[str] = field(default_factory=Counter)
    """CPU seconds by program."""

    @contextmanager
    def counting(self, work: float) -> Iterator[None]:
        cpu_before = read_cpu()
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu.update(spent_since(cpu_before))
        self.work += work

    def cpu_for_each(self) -> dict[str, float]:
        """CPU seconds for each unit of work, by program."""
        return {program: seconds / self.work for program, seconds in self.cpu.most_common()}


MILLISECONDS: Final = "ms"
"""The unit of a figure of which less is better."""

Measured = Callable[[Timer], None]
"""Does its work once, the part that counts inside `timer.counting(how much)`."""


def allowed(seconds: float) -> Measured:
    """The control of a figure that has a bound and nothing beside it."""

    def control(timer: Timer) -> None:
        timer.work += 1
        timer.seconds += seconds

    return control


@dataclass(frozen=True)
class Figure:
    """One thing beside its control."""

    name: str
    unit: str
    ours: Measured
    control: Measured
    control_name: str
    floor: float | None = None
    """The least that the ratio to the control may be."""
    ceiling: float | None = None
    """The most that it may be, for a figure of which less is better."""
    reach: float | None = None
    """What we are after."""

    def of(self, timer: Timer) -> float:
        """What *timer* has measured, in this figure's unit: milliseconds for each unit of work, or work in a second."""
        if self.unit == MILLISECONDS:
            return timer.seconds * 1_000 / timer.work
        return timer.work / timer.seconds


@dataclass(frozen=True)
class Result:
    """A measured figure."""

    name: str
    value: float
    unit: str
    control: float
    control_name: str
    ratio: float
    floor: float | None
    ceiling: float | None
    reach: float | None
    cpu: Mapping[str, float]
    """CPU seconds of every process for each unit of our work, by program."""
    control_cpu: Mapping[str, float]
    """The same of the control."""

    @property
    def holds(self) -> bool:
        return (self.floor is None or self.ratio >= self.floor) and (
            self.ceiling is None or self.ratio <= self.ceiling
        )

    @property
    def reaches(self) -> bool | None:
        """Whether it is as good as we want it; None where that was not said."""
        if self.reach is None:
            return None
        return self.ratio <= self.reach if self.unit == MILLISECONDS else self.ratio >= self.reach

    @property
    def bound(self) -> str:
        """What the ratio must keep to, as a text; empty where it is only shown."""
        if self.ceiling is not None:
            return f"<= {self.ceiling}"
        return "" if self.floor is None else f">= {self.floor}"


def measure(figure: Figure, rounds: int) -> Result:
    """Run ours and the control in the order A B B A, so that neither has the warmer machine."""
    sides = {"ours": figure.ours, "control": figure.control}
    found: dict[str, list[float]] = {name: [] for name in sides}
    totals = {name: Timer() for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            timer = Timer()
            sides[name](timer)
            found[name].append(figure.of(timer))
            totals[name].work += timer.work
            totals[name].cpu.update(timer.cpu)
    value, control = median(found["ours"]), median(found["control"])
    return Result(
        figure.name,
        value,
        figure.unit,
        control,
        figure.control_name,
        value / control,
        figure.floor,
        figure.ceiling,
        figure.reach,
        totals["ours"].cpu_for_each(),
        totals["control"].cpu_for_each(),
    )
