"""Each rule of `saga check` finds the smallest choreography that breaks it, at its line, and leaves
the correct twin alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from saga.check import check
from tests.unit.saga_stage import A, B, C, D, E, No, Stage, anything, source_of

Declare = Callable[[Stage], None]


def whole(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, rejects=No, name="take")(anything).compensation(anything)
    s.order.join(B, completes=True, name="end")(anything)


def a_decision_that_waits_for_ever(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.order.join(B, completes=True, name="end")(anything)  # found


def a_decision_that_says_why_it_may_wait(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.order.join(B, completes=True, no_deadline="patience", name="end")(anything)


def a_decision_that_waits_for_nobody_else(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.order.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.order.join(B, completes=True, name="end")(anything)


# ---- events ----


def two_services_of_one_name(s: Stage) -> None:
    whole(s)
    s.service("order").on(B, name="hear")(lambda event, session: None)  # found


def two_services_of_two_names(s: Stage) -> None:
    whole(s)
    s.service("desk").on(B, name="hear")(lambda event, session: None)


def an_event_that_nobody_takes(s: Stage) -> None:
    whole(s)
    s.pay.step(on=A, emits=C, name="charge", nothing_to_undo="free")(anything)  # found


def an_event_for_whoever_cares(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, rejects=No, pivot=True, name="take")(anything)
    s.pay.step(on=B, emits=C, retriable=True, name="thank")(anything)
    s.pay.publishes(C)


def an_event_that_a_subscriber_takes(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=(B, C), name="take")(anything).compensation(anything)
    s.order.join(B, completes=True, name="end")(anything)
    s.order.join(C, emits=D, completes=True, name="end_otherwise")(anything)
    s.service("desk").on(C, name="hear")(lambda event, session: None)


def a_step_on_what_nobody_emits(s: Stage) -> None:
    whole(s)
    s.pay.step(on=C, name="charge")(anything)  # found


def a_step_on_what_is_only_published(s: Stage) -> None:
    a_step_on_what_nobody_emits(s)
    s.order.publishes(C)


def a_subscription_to_what_nobody_emits(s: Stage) -> None:
    whole(s)
    s.service("desk").on(C, name="hear")(lambda event, session: None)  # found


def a_subscription_to_what_is_published(s: Stage) -> None:
    whole(s)
    s.order.publishes(C)
    s.service("desk").on(C, name="hear")(lambda event, session: None)


def a_step_on_a_rejection(s: Stage) -> None:
    whole(s)
    s.pay.step(on=No, name="refund")(anything)  # found


def a_subscription_to_a_rejection(s: Stage) -> None:
    whole(s)
    s.pay.on(No, name="hear")(lambda event, session: None)


def one_event_from_two_places(s: Stage) -> None:
    whole(s)
    s.pay.step(on=A, emits=B, name="also")(anything).compensation(anything)  # found


# ---- ways ----


def a_circle_that_nobody_enters(s: Stage) -> None:
    whole(s)
    s.pay.step(on=C, emits=D, name="there")(anything).compensation(anything)  # found
    s.pay.step(on=D, emits=C, name="back")(anything).compensation(anything)  # found


def a_join_of_answers_that_exclude_each_other(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=(B, C), name="take")(anything).compensation(anything)
    s.order.join(B, C, completes=True, name="end")(anything)  # found


def a_join_of_answers_that_come_together(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.pay.step(on=A, emits=C, name="charge")(anything).compensation(anything)
    s.order.join(B, C, completes=True, name="end")(anything)


def a_join_of_two_sagas(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.order.starts(D).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.pay.step(on=D, emits=C, name="charge")(anything).compensation(anything)
    s.order.join(B, C, completes=True, name="end")(anything)  # found


def a_join_that_waits_for_itself(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=C, emits=B, name="take")(anything).compensation(anything)
    s.order.join(A, B, emits=C, name="end", completes=True)(anything)  # found


def a_circle_without_an_exit(s: Stage) -> None:
    whole(s)
    s.pay.step(on=B, emits=C, name="there")(anything).compensation(anything)  # found
    s.stock.step(on=C, emits=B, name="back")(anything).compensation(anything)


def a_circle_with_an_exit(s: Stage) -> None:
    whole(s)
    s.pay.step(on=B, emits=C, rejects=No, name="there")(anything).compensation(anything)  # found
    s.stock.step(on=C, emits=B, name="back")(anything).compensation(anything)


def a_branch_that_the_decision_does_not_wait_for(s: Stage) -> None:
    whole(s)
    s.pay.step(on=A, name="charge")(anything).compensation(anything)  # found


def a_branch_after_the_decision(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, rejects=No, name="take")(anything).compensation(anything)
    s.order.join(B, emits=C, completes=True, name="end")(anything)
    s.pay.step(on=C, name="thank")(anything)


# ---- deciding ----


def a_saga_without_an_end(s: Stage) -> None:
    s.order.starts(A).compensation(anything)  # found
    s.stock.step(on=A, name="take")(anything).compensation(anything)


def an_answer_that_leads_nowhere(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=(B, C), name="take")(anything).compensation(anything)  # found
    s.order.join(B, completes=True, name="end")(anything)
    s.pay.step(on=C, name="note")(anything).compensation(anything)


def an_answer_that_may_lead_to_a_rejection_or_nowhere(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=(B, C), name="take")(anything).compensation(anything)  # found
    s.order.join(B, completes=True, name="end")(anything)
    s.pay.step(on=C, rejects=No, name="note")(anything).compensation(anything)


def two_participants_that_decide(s: Stage) -> None:
    whole(s)
    s.pay.join(B, completes=True, name="end_too")(anything)  # found


def two_joins_of_one_participant_that_decide(s: Stage) -> None:
    whole(s)
    s.order.join(B, completes=True, name="end_too")(anything)


def a_rejection_after_the_decision(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.order.join(B, emits=C, completes=True, name="end")(anything)
    s.pay.step(on=C, rejects=No, name="thank")(anything)  # found


def giving_up_after_the_decision(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.order.join(B, emits=C, completes=True, name="end")(anything)
    s.pay.step(on=C, exhausted="abort", name="thank")(anything)  # found


def a_rejection_beside_the_decision(s: Stage) -> None:
    whole(s)
    s.pay.step(on=A, emits=C, rejects=No, name="charge")(anything).compensation(anything)  # found
    s.service("desk").on(C, name="hear")(lambda event, session: None)


def a_rejection_that_the_decision_waits_for(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.pay.step(on=A, emits=C, rejects=No, name="charge")(anything).compensation(anything)
    s.order.join(B, C, completes=True, name="end")(anything)


def a_rejection_beside_the_decision_under_its_lock(s: Stage) -> None:
    """One of the two wins, but the rejection that comes second would be stuck."""
    whole(s)
    s.order.step(on=A, rejects=No, name="ask")(anything).compensation(anything)  # found


def giving_up_beside_the_decision_under_its_lock(s: Stage) -> None:
    whole(s)
    s.order.step(on=A, exhausted="abort", name="ask")(anything).compensation(anything)


# ---- undoing ----


def a_step_before_a_rejection_without_compensation(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything)  # found
    s.pay.step(on=B, emits=C, rejects=No, name="charge")(anything).compensation(anything)
    s.order.join(C, completes=True, name="end")(anything)


def a_start_before_a_rejection_without_compensation(s: Stage) -> None:
    s.order.starts(A)  # found
    s.stock.step(on=A, emits=B, rejects=No, name="take")(anything).compensation(anything)
    s.order.join(B, completes=True, name="end")(anything)


def a_step_that_only_a_person_can_abort_without_compensation(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything)  # found
    s.order.join(B, completes=True, name="end")(anything)


def a_step_that_has_nothing_to_undo(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take", nothing_to_undo="it only looks")(anything)
    s.order.join(B, completes=True, name="end")(anything)


def a_call_that_nobody_can_ask_about(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, external=True, name="take")(anything).compensation(  # found
        anything
    )
    s.order.join(B, completes=True, name="end")(anything)


def a_call_that_can_be_asked_about(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    step = s.stock.step(on=A, emits=B, external=True, name="take")(anything)
    step.compensation(anything)
    step.resolve(anything)
    s.order.join(B, completes=True, name="end")(anything)


def a_deadline_far_from_the_decision(s: Stage) -> None:
    s.stock.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.order.join(B, completes=True, name="end")(anything)
    s.stock.deadline(rejects=No, minutes=5, name="too_late")(anything)  # found


def a_deadline_beside_the_decision(s: Stage) -> None:
    whole(s)
    s.order.deadline(rejects=D, minutes=5, name="too_late")(anything)
    s.service("desk").on(D, name="hear")(lambda event, session: None)


def a_step_that_a_deadline_undoes_without_compensation(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything)  # found
    s.order.join(B, completes=True, name="end")(anything)
    s.order.deadline(rejects=No, minutes=5, name="too_late")(anything)


def a_pivot_and_what_is_retriable_after_it(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.pay.step(on=B, emits=C, rejects=No, pivot=True, name="charge")(anything)
    s.stock.step(on=C, retriable=True, name="send")(anything)


def a_rejection_after_the_pivot(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.pay.step(on=B, emits=C, rejects=No, pivot=True, name="charge")(anything)
    s.stock.step(on=C, rejects=E, name="send")(anything).compensation(anything)  # found


def a_retriable_step_before_the_decision(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, retriable=True, name="take")(anything)  # found
    s.order.join(B, completes=True, name="end")(anything)


def an_any_of_join_whose_other_branch_can_reject(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=B, name="take")(anything).compensation(anything)
    s.pay.step(on=A, emits=C, rejects=No, name="charge")(anything).compensation(anything)  # found
    s.order.join(B, C, needs=1, completes=True, name="end")(anything)


def an_any_of_join_of_what_comes_instead_of_each_other(s: Stage) -> None:
    s.order.starts(A).compensation(anything)
    s.stock.step(on=A, emits=(B, C), rejects=No, name="take")(anything).compensation(anything)
    s.order.join(B, C, needs=1, completes=True, name="end")(anything)


BROKEN: list[tuple[str, str, Declare]] = [
    ("same-name", "error", two_services_of_one_name),
    ("unheard-event", "error", an_event_that_nobody_takes),
    ("unproduced-event", "error", a_step_on_what_nobody_emits),
    ("unproduced-event", "error", a_step_on_what_is_only_published),
    ("unproduced-event", "warning", a_subscription_to_what_nobody_emits),
    ("rejection-leads-on", "error", a_step_on_a_rejection),
    ("two-producers", "warning", one_event_from_two_places),
    ("unreachable", "error", a_circle_that_nobody_enters),
    ("join-never-fires", "error", a_join_of_answers_that_exclude_each_other),
    ("join-never-fires", "error", a_join_of_two_sagas),
    ("join-never-fires", "error", a_join_that_waits_for_itself),
    ("cycle", "error", a_circle_without_an_exit),
    ("cycle", "warning", a_circle_with_an_exit),
    ("branch-not-joined", "warning", a_branch_that_the_decision_does_not_wait_for),
    ("no-decision", "error", a_saga_without_an_end),
    ("undecided-way", "error", an_answer_that_leads_nowhere),
    ("undecided-way", "warning", an_answer_that_may_lead_to_a_rejection_or_nowhere),
    ("two-decisions", "error", two_participants_that_decide),
    ("abort-after-decision", "error", a_rejection_after_the_decision),
    ("abort-after-decision", "error", giving_up_after_the_decision),
    ("abort-beside-decision", "error", a_rejection_beside_the_decision),
    ("abort-beside-decision", "error", a_rejection_beside_the_decision_under_its_lock),
    ("no-compensation", "error", a_step_before_a_rejection_without_compensation),
    ("no-compensation", "error", a_start_before_a_rejection_without_compensation),
    ("deadline-far-from-decision", "error", a_deadline_far_from_the_decision),
    ("no-compensation", "error", a_step_that_a_deadline_undoes_without_compensation),
    ("abort-after-decision", "error", a_rejection_after_the_pivot),
    ("no-deadline", "warning", a_decision_that_waits_for_ever),
    ("retriable-before-decision", "error", a_retriable_step_before_the_decision),
    ("abort-beside-decision", "error", an_any_of_join_whose_other_branch_can_reject),
    ("uncertain-call", "warning", a_call_that_nobody_can_ask_about),
    ("no-compensation", "warning", a_step_that_only_a_person_can_abort_without_compensation),
]
SOUND: list[Declare] = [
    an_event_for_whoever_cares,
    a_decision_that_says_why_it_may_wait,
    a_decision_that_waits_for_nobody_else,
    a_deadline_beside_the_decision,
    a_pivot_and_what_is_retriable_after_it,
    an_any_of_join_of_what_comes_instead_of_each_other,
    a_call_that_can_be_asked_about,
    whole,
    two_services_of_two_names,
    an_event_that_a_subscriber_takes,
    a_subscription_to_what_is_published,
    a_subscription_to_a_rejection,
    a_join_of_answers_that_come_together,
    a_branch_after_the_decision,
    two_joins_of_one_participant_that_decide,
    a_rejection_that_the_decision_waits_for,
    giving_up_beside_the_decision_under_its_lock,
    a_step_that_has_nothing_to_undo,
]


def _name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("rule", "severity", "declare"), BROKEN, ids=_name)
def test_a_rule_finds_what_breaks_it_at_its_line(
    rule: str, severity: str, declare: Declare
) -> None:
    stage = Stage()
    declare(stage)
    findings = [one for one in check(stage.contracts()) if one.rule == rule]
    assert findings
    assert {one.severity for one in findings} == {severity}
    for one in findings:
        assert "# found" in source_of(one), str(one)
        assert str(one).startswith("tests/unit/test_saga_check_rules.py:")


@pytest.mark.parametrize("declare", SOUND, ids=_name)
def test_nothing_is_found_in_what_is_sound(declare: Declare) -> None:
    """But for the deadline, which most of them leave out for brevity."""
    stage = Stage()
    declare(stage)
    assert {one.rule for one in check(stage.contracts())} <= {"no-deadline"}


@pytest.mark.parametrize(
    "declare",
    [
        a_deadline_beside_the_decision,
        a_decision_that_says_why_it_may_wait,
        a_decision_that_waits_for_nobody_else,
    ],
    ids=_name,
)
def test_a_deadline_ends_the_wait(declare: Declare) -> None:
    stage = Stage()
    declare(stage)
    assert check(stage.contracts()) == []


def test_every_rule_has_a_choreography_that_breaks_it() -> None:
    from saga.check import RULES

    # Of two registries each, so in `test_saga_check_contracts.py`.
    elsewhere = {"version_not_read", "schemas_disagree"}
    assert len(RULES) - len(elsewhere) == len({rule for rule, _, _ in BROKEN})


def test_errors_come_before_warnings() -> None:
    stage = Stage()
    a_branch_that_the_decision_does_not_wait_for(stage)
    stage.pay.step(on=E, name="late")(anything)
    stage.pay.step(on=D, name="later")(anything)
    severities = [one.severity for one in check(stage.contracts())]
    assert severities == sorted(severities)
    assert set(severities) == {"error", "warning"}


def test_many_choices_are_looked_at_as_if_made_all_at_once() -> None:
    stage = Stage()
    stage.order.starts(A).compensation(anything)
    for number in range(12):
        stage.stock.step(on=A, emits=(B, C), name=f"take_{number}")(anything).compensation(anything)
    stage.order.join(B, C, completes=True, name="end")(anything)
    assert "join-never-fires" not in {one.rule for one in check(stage.contracts())}
