"""What a figure is: two things done in turn, several rounds, and the ratio of their medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median


@dataclass
class Timer:
    """What a thing has done, and the time it took; setting up is not counted."""

    work: float = 0
    seconds: float = 0
    cpu: float = 0

    @contextmanager
    def counting(self, work: float) -> Iterator[None]:
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu += time.process_time() - cpu_began
        self.work += work


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
    """The most that it may be, for a figure of which less is better: milliseconds for each unit of work."""
    reach: float | None = None
    """What we are after."""

    def of(self, timer: Timer) -> float:
        """What *timer* has measured, in this figure's unit."""
        if self.ceiling is not None:
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
    cpu: float
    """CPU seconds of this process for each unit of work of ours."""

    @property
    def holds(self) -> bool:
        return (self.floor is None or self.ratio >= self.floor) and (
            self.ceiling is None or self.ratio <= self.ceiling
        )

    @property
    def bound(self) -> str:
        """What the ratio must keep to, as a text."""
        return f">= {self.floor}" if self.ceiling is None else f"<= {self.ceiling}"


def measure(figure: Figure, rounds: int) -> Result:
    """Run ours and the control in the order A B B A, so that neither has the warmer machine."""
    found: dict[str, list[float]] = {"ours": [], "control": []}
    cpu = work = 0.0
    for number in range(rounds):
        for name in ("ours", "control") if number % 2 == 0 else ("control", "ours"):
            timer = Timer()
            (figure.ours if name == "ours" else figure.control)(timer)
            found[name].append(figure.of(timer))
            if name == "ours":
                cpu += timer.cpu
                work += timer.work
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
        cpu / work,
    )
