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


@dataclass(frozen=True)
class Figure:
    """One thing beside its control."""

    name: str
    unit: str
    ours: Measured
    control: Measured
    control_name: str
    floor: float
    """The least that the ratio to the control may be."""


@dataclass(frozen=True)
class Result:
    """A measured figure."""

    name: str
    value: float
    unit: str
    control: float
    control_name: str
    ratio: float
    floor: float
    cpu: float
    """CPU seconds of this process for each unit of work of ours."""

    @property
    def holds(self) -> bool:
        return self.ratio >= self.floor


def measure(figure: Figure, rounds: int) -> Result:
    """Run ours and the control in the order A B B A, so that neither has the warmer machine."""
    rates: dict[str, list[float]] = {"ours": [], "control": []}
    cpu = work = 0.0
    for number in range(rounds):
        for name in ("ours", "control") if number % 2 == 0 else ("control", "ours"):
            timer = Timer()
            (figure.ours if name == "ours" else figure.control)(timer)
            rates[name].append(timer.work / timer.seconds)
            if name == "ours":
                cpu += timer.cpu
                work += timer.work
    value, control = median(rates["ours"]), median(rates["control"])
    return Result(
        figure.name,
        value,
        figure.unit,
        control,
        figure.control_name,
        value / control,
        figure.floor,
        cpu / work,
    )
