"""What `make bench` says of what it measured: its figures decide whether a floor holds, so they are tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import bench.__main__ as command
from bench.figures import MILLISECONDS, Figure, Timer, measure


def doing(work: float, seconds: float) -> Callable[[Timer], None]:
    def measured(timer: Timer) -> None:
        timer.work += work
        timer.seconds += seconds

    return measured


def figure(ours: float, control: float, **bounds: float) -> Figure:
    return Figure(
        "f", "events/s", doing(ours, 1), doing(control, 1), "the other", **bounds
    )  # fmt: skip


def slow(ours: float, control: float, **bounds: float) -> Figure:
    return Figure("f", MILLISECONDS, doing(1, ours), doing(1, control), "the other", **bounds)


@pytest.mark.parametrize(
    ("one", "ratio", "holds", "reaches"),
    [
        (figure(200, 100, floor=2, reach=3), 2, True, False),
        (figure(199, 100, floor=2), 1.99, False, None),
        (figure(300, 100, floor=2, reach=3), 3, True, True),
        (figure(10, 100), 0.1, True, None),
        (slow(1.5, 1, ceiling=1.5, reach=1.5), 1.5, True, True),
        (slow(1.6, 1, ceiling=1.5, reach=1), 1.6, False, False),
        (slow(0.9, 1, reach=1), 0.9, True, True),
    ],
)
def test_a_bound_is_kept_or_missed_by_the_ratio(
    one: Figure, ratio: float, holds: bool, reaches: bool | None
) -> None:
    result = measure(one, rounds=3)

    assert result.ratio == pytest.approx(ratio)
    assert (result.holds, result.reaches) == (holds, reaches)


def test_sides_take_turns_so_that_neither_has_the_warmer_machine() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[Timer], None]:
        def measured(timer: Timer) -> None:
            order.append(name)
            timer.work, timer.seconds = 1, 1

        return measured

    measure(Figure("f", "events/s", side("a"), side("b"), "b"), rounds=4)

    assert "".join(order) == "abbaabba"


def test_a_missed_floor_is_shown_in_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command._print([measure(figure(199, 100, floor=2, reach=3), rounds=1)])

    shown = capsys.readouterr().out
    assert "MISSED" in shown
    assert "3 missed" in shown


def test_results_are_kept_beside_those_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.json")

    def keep(name: str, ours: float) -> None:
        one = Figure(name, "events/s", doing(ours, 1), doing(1, 1), "the other", floor=1)
        command._keep(measure(one, rounds=1))

    keep("first", 2)
    keep("second", 3)
    keep("first", 0.5)

    kept = {one["name"]: one for one in json.loads(command.RESULTS.read_text())}
    assert {name: one["ratio"] for name, one in kept.items()} == {"first": 0.5, "second": 3}
    assert (kept["first"]["holds"], kept["second"]["holds"]) == (False, True)
    asked_for = {"name", "value", "unit", "control", "ratio", "floor"}
    assert asked_for <= kept["first"].keys()
