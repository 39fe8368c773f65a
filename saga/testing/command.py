"""A simulation as a command: `python -m my.simulated --schedules 1000 --seed 7`."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import click

from saga.testing.simulation import Broken, Simulation


def run(simulation: Simulation) -> None:
    """Run *simulation* as the command line asks, over all processors; exit 1 for what breaks."""

    @click.command(help="Run the simulation over many schedules, each from a seed of its own.")
    @click.option("--schedules", default=200, show_default=True)
    @click.option("--seed", type=int, help="The first seed.  [default: from the clock]")
    @click.option("--processes", default=os.cpu_count() or 1, show_default=True)
    def command(schedules: int, seed: int | None, processes: int) -> None:
        first = int(time.time()) % 1_000_000 * 1_000 if seed is None else seed
        size = max(1, min(100, -(-schedules // processes)))
        begins = range(first, first + schedules, size)
        began = time.monotonic()
        # Forked, so that the simulation, which no pickle holds, is there already.
        with ProcessPoolExecutor(processes, get_context("fork"), _hold, (simulation,)) as pool:
            parts = [
                pool.submit(_run, begin, min(size, first + schedules - begin)) for begin in begins
            ]
            broken = next((told for part in parts if (told := part.result())), None)
            if broken is not None:
                pool.shutdown(cancel_futures=True)
                click.echo(broken, err=True)
                raise SystemExit(1)
        took = time.monotonic() - began
        click.echo(
            f"{schedules} schedules from seed {first} in {took:.0f} s "
            f"({schedules / took * 60:.0f} a minute): all invariants held"
        )

    command()


_held: list[Simulation] = []


def _hold(simulation: Simulation) -> None:
    # What a simulated worker says when it is killed interests nobody.
    logging.disable(logging.CRITICAL)
    _held.append(simulation)


def _run(seed: int, schedules: int) -> str | None:
    try:
        _held[0].run(schedules, seed)
    except Broken as broken:
        return str(broken)
    return None
