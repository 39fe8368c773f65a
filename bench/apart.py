"""Measuring in a process of its own: a relay has one, and what another side has left in memory is not in its way.

Freed objects leave holes all over the heap, and what is put into them is not in the processor's cache: after a loop
over 300,000 records made beforehand, a relay in the same process took a third more CPU time for an event.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench.figures import Measured, Timer

_of_this_process: list[Measured] = []


def apart(stack: ExitStack, make: Callable[..., Measured], *arguments: Any) -> Measured:
    """What `make(*arguments)` makes, in a process that ends with *stack*; begun when it is first asked."""
    pools: list[Any] = []

    def measured(timer: Timer) -> None:
        if not pools:
            context = multiprocessing.get_context("spawn")
            pools.append(stack.enter_context(context.Pool(1, _begin, (make, arguments))))
        one: Timer = pools[0].apply(_measure)
        timer.work += one.work
        timer.seconds += one.seconds
        timer.cpu.update(one.cpu)

    return measured


def _begin(make: Callable[..., Measured], arguments: tuple[Any, ...]) -> None:
    _of_this_process[:] = [make(*arguments)]


def _measure() -> Timer:
    timer = Timer()
    _of_this_process[0](timer)
    return timer
