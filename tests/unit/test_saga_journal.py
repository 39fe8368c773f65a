"""The two state machines of the journal, and what a run is called."""

from __future__ import annotations

from itertools import product
from uuid import uuid4

import pytest

from saga import CurrentSaga, IllegalTransition, current
from saga.context import working_for
from saga.journal import (
    SAGA_TRANSITIONS,
    STEP_TRANSITIONS,
    RunKey,
    SagaState,
    StepState,
    check_saga_move,
    check_step_move,
)

KEY = RunKey(uuid4(), "act", uuid4())


def test_an_ended_saga_never_moves_again() -> None:
    for ended, after in product((SagaState.COMPLETED, SagaState.COMPENSATED), SagaState):
        with pytest.raises(IllegalTransition, match=f"cannot go from {ended} to {after}"):
            check_saga_move(KEY.saga_id, ended, after)


def test_a_saga_that_is_being_undone_can_only_be_undone() -> None:
    assert SAGA_TRANSITIONS[SagaState.COMPENSATING] == {SagaState.COMPENSATED}


@pytest.mark.parametrize("state", [StepState.REJECTED, StepState.SKIPPED, StepState.COMPENSATED])
def test_a_run_that_left_nothing_behind_stays_as_it_is(state: StepState) -> None:
    for after in StepState:
        with pytest.raises(IllegalTransition):
            check_step_move(KEY, state, after)


def test_only_a_run_that_was_done_or_has_called_outside_is_ever_compensated() -> None:
    leading_there = {
        before for before, after in STEP_TRANSITIONS.items() if StepState.COMPENSATING in after
    }
    outside = {StepState.NOT_HAPPENED, *(state for state in StepState if state.is_uncertain)}
    assert leading_there == {StepState.DONE, *outside}


def test_what_waits_for_a_person_can_always_be_resumed() -> None:
    for state in StepState:
        if state.waits_for_a_person:
            assert STEP_TRANSITIONS[state] - {state}


def test_a_runs_idempotency_key_is_its_own_and_differs_for_its_compensation() -> None:
    saga = CurrentSaga(KEY.saga_id, "stock", KEY.step, KEY.trigger_id)
    undo = CurrentSaga(KEY.saga_id, "stock", KEY.step, KEY.trigger_id, compensating=True)
    other = CurrentSaga(KEY.saga_id, "stock", KEY.step, uuid4())
    assert len({saga.idempotency_key, undo.idempotency_key, other.idempotency_key}) == 3
    assert saga.idempotency_key == CurrentSaga(
        KEY.saga_id, "stock", KEY.step, KEY.trigger_id
    ).idempotency_key  # fmt: skip


def test_the_current_saga_is_known_inside_a_step_only() -> None:
    saga = CurrentSaga(KEY.saga_id, "stock", KEY.step, KEY.trigger_id)
    assert current() is None
    with working_for(saga):
        assert current() == saga
    assert current() is None
