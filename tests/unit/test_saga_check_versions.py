"""`saga diff`: what an open saga would meet in a new version, each with a change that is harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from saga.compare import compare
from saga.contract import contract_of, read_contract, to_json
from saga.findings import Finding
from tests.unit.saga_stage import A, B, C, D, No, Stage, anything, source_of

Declare = Callable[[Stage], None]


def hear(event: object, session: object) -> None: ...


def version_1(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def differences(tmp_path: Path, after: Declare, before: Declare = version_1) -> list[Finding]:
    old, new = Stage(), Stage()
    before(old)
    after(new)
    path = tmp_path / "old.json"
    path.write_text(to_json(contract_of(old.services[0])), encoding="utf-8")
    return compare(read_contract(path), contract_of(new.services[0]))


# Each puts the line that a finding names behind "# found".


def another_name(s: Stage) -> None:
    s.pay.starts(A)  # found


def step_removed(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def step_renamed(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="reserve")(anything).compensation(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def step_renamed_with_alias(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="reserve", was="take")(anything).compensation(anything)
    s.stock.join(B, C, name="finish", was="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def alias_without_compensation(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="reserve", was="take")(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def step_added(s: Stage) -> None:
    version_1(s)
    s.stock.step(on=B, name="more")(anything).compensation(anything)  # found


def compensation_removed(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def compensation_not_needed(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take", nothing_to_undo="it looks")(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def start_removed(s: Stage) -> None:
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def another_trigger(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=D, emits=B, name="take")(anything).compensation(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def join_that_waits_for_more(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.stock.join(B, C, D, name="end", completes=True)(anything)  # found
    s.stock.on(D, name="stock.hear")(hear)


def join_that_became_a_step(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.stock.step(on=B, name="end")(anything)  # found
    s.stock.on(D, name="stock.hear")(hear)


def join_that_decides_no_more(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.stock.join(B, C, name="end")(anything)  # found
    s.stock.on(D, name="stock.hear")(hear)


def another_answer(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=D, name="take")(anything).compensation(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def one_more_rejection(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, rejects=No, name="take")(anything).compensation(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def giving_up(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, exhausted="abort", name="take")(anything).compensation(  # found
        anything
    )
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


def subscription_dropped(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)  # found
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.stock.join(B, C, name="end", completes=True)(anything)


def with_deadline(s: Stage) -> None:
    version_1(s)
    s.stock.deadline(rejects=No, minutes=5, name="too_late")(anything)


def join_that_needs_less(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.stock.join(B, C, needs=1, name="end", completes=True)(anything)  # found
    s.stock.on(D, name="stock.hear")(hear)


def step_that_became_the_pivot(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take", pivot=True)(anything)  # found
    s.stock.join(B, C, name="end", completes=True)(anything)
    s.stock.on(D, name="stock.hear")(hear)


MET: list[tuple[str, str, Declare]] = [
    ("participant-renamed", "error", another_name),
    ("step-removed", "error", step_removed),
    ("step-renamed", "error", step_renamed),
    ("step-added", "warning", step_added),
    ("compensation-removed", "error", compensation_removed),
    ("compensation-removed", "error", alias_without_compensation),
    ("compensation-removed", "warning", compensation_not_needed),
    ("start-removed", "error", start_removed),
    ("trigger-changed", "error", another_trigger),
    ("trigger-changed", "error", join_that_waits_for_more),
    ("trigger-changed", "error", join_that_became_a_step),
    ("decision-moved", "error", join_that_decides_no_more),
    ("trigger-changed", "warning", join_that_needs_less),
    ("decision-moved", "error", step_that_became_the_pivot),
    ("emits-changed", "error", another_answer),
    ("new-rejection", "warning", one_more_rejection),
    ("new-rejection", "warning", giving_up),
    ("subscription-dropped", "warning", subscription_dropped),
]


def _name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("rule", "severity", "after"), MET, ids=_name)
def test_what_an_open_saga_would_meet_is_found_at_its_line(
    rule: str, severity: str, after: Declare, tmp_path: Path
) -> None:
    (one,) = (
        one for one in differences(tmp_path, after) if (one.rule, one.severity) == (rule, severity)
    )
    assert "# found" in source_of(one), str(one)


@pytest.mark.parametrize("after", [version_1, step_renamed_with_alias], ids=_name)
def test_an_open_saga_meets_nothing_in_what_is_the_same_to_it(
    after: Declare, tmp_path: Path
) -> None:
    assert differences(tmp_path, after) == []


def test_a_deadline_that_goes_is_said(tmp_path: Path) -> None:
    (one,) = differences(tmp_path, version_1, with_deadline)
    assert (one.rule, one.severity) == ("deadline-removed", "warning")
    assert differences(tmp_path, with_deadline, version_1) == []


def test_an_alias_that_goes_is_said(tmp_path: Path) -> None:
    def without_alias(s: Stage) -> None:
        step_renamed(s)

    findings = differences(tmp_path, without_alias, step_renamed_with_alias)
    assert ("alias-dropped", "warning") in {(one.rule, one.severity) for one in findings}


def external(*, resolves: bool) -> Declare:
    def declare(s: Stage) -> None:
        step = s.stock.step(on=A, emits=B, name="take", external=True)(anything)  # found
        step.compensation(anything)
        if resolves:
            step.resolve(anything)

    return declare


def not_external(s: Stage) -> None:
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)  # found


@pytest.mark.parametrize(
    ("after", "severity"),
    [(not_external, "error"), (external(resolves=False), "warning")],
    ids=["not_external", "no_hook"],
)
def test_calls_that_are_under_way_stay_resolvable(
    after: Declare, severity: str, tmp_path: Path
) -> None:
    (one,) = differences(tmp_path, after, external(resolves=True))
    assert (one.rule, one.severity) == ("external-changed", severity)
    assert "# found" in source_of(one)
    assert differences(tmp_path, external(resolves=True), not_external) == []


# ---- versions of an event ----


@dataclass(frozen=True)
class Wide:
    id: str
    more: str


@dataclass(frozen=True)
class Wider:
    id: str
    more: str = ""


def taking(cls: type, version: int, *, upcasts: bool = False) -> Declare:
    def declare(s: Stage) -> None:
        s.registry.event("t.wide", version=version, key="id")(cls)
        if upcasts:
            s.registry.upcast("t.wide", from_version=version - 1)(lambda data: {**data, "more": ""})
        s.stock.step(on=cls, emits=B, name="take")(anything).compensation(anything)

    return declare


@dataclass(frozen=True)
class Narrow:
    id: str


def test_a_version_that_was_raised_without_an_upcaster_is_found(tmp_path: Path) -> None:
    findings = differences(tmp_path, taking(Wide, 2), taking(Narrow, 1))
    assert [one.rule for one in findings] == ["version-dropped"]
    assert "add an upcaster" in findings[0].message


def test_a_version_that_was_raised_with_an_upcaster_is_read(tmp_path: Path) -> None:
    assert differences(tmp_path, taking(Wide, 2, upcasts=True), taking(Narrow, 1)) == []


def test_a_field_that_became_required_under_the_same_version_is_found(tmp_path: Path) -> None:
    findings = differences(tmp_path, taking(Wide, 1), taking(Narrow, 1))
    assert [one.rule for one in findings] == ["schema-changed"]
    assert differences(tmp_path, taking(Wider, 1), taking(Narrow, 1)) == []


def test_an_emitted_version_that_was_raised_is_said(tmp_path: Path) -> None:
    def emitting(cls: type, version: int) -> Declare:
        def declare(s: Stage) -> None:
            s.registry.event("t.wide", version=version, key="id")(cls)
            s.stock.step(on=A, emits=cls, name="take", nothing_to_undo="no")(anything)

        return declare

    findings = differences(tmp_path, emitting(Wide, 2), emitting(Narrow, 1))
    assert ("version-raised", "warning") in {(one.rule, one.severity) for one in findings}
