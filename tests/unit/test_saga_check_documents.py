"""The documents about checks: every rule is in the table, and what is drawn is current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from saga.canvas import canvas
from saga.cli.targets import contracts
from saga.flow import Flow
from saga.graph import mermaid

ROOT = Path(__file__).parents[2]
CHECK = (ROOT / "docs" / "check.md").read_text()


def rules(*files: str) -> set[str]:
    """The names that findings are made with in the source."""
    source = "\n".join((ROOT / "saga" / file).read_text() for file in files)
    return set(re.findall(r'\b(?:error|warning)\(\s*"([a-z-]+)"', source))


@pytest.mark.parametrize(
    ("title", "files"),
    [
        ("Rules", [str(path.relative_to(ROOT / "saga")) for path in ROOT.glob("saga/rules/*.py")]),
        ("A new version", ["compare.py"]),
    ],
    ids=["check", "diff"],
)
def test_every_rule_is_in_the_table_and_no_other(title: str, files: list[str]) -> None:
    section = CHECK.split(f"\n## {title}\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)`", section, re.MULTILINE)) == rules(*files)


def test_the_order_saga_is_drawn_as_it_is_declared() -> None:
    """In a process of its own, as others may have declared more in this one."""
    drawn = subprocess.run(
        [
            sys.executable,
            "-c",
            "import runpy; print(runpy.run_path('tools/draw-order-saga')['document'](), end='')",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    current = (ROOT / "docs" / "order_saga.md").read_text()
    assert drawn.stdout == current, "run .venv/bin/python tools/draw-order-saga"


def test_the_canvas_and_the_graph_of_the_trip_show_its_choice_and_its_deadline() -> None:
    modules = (f"examples.trip_saga.{name}" for name in ("trips", "carriers", "hotel"))
    flow = Flow(contracts(modules))
    rows = {row[0]: row for row in canvas(flow)}
    assert rows["choose_seat (join)"][2] == "any of rail.seat_held, air.seat_held"
    assert rows["give_up (deadline)"][2:5] == (
        "0:10:00 after trip.requested",
        "-",
        "trip.timed_out",
    )
    assert '-. "trip.timed_out" .-> n_aborted' in mermaid(flow)
