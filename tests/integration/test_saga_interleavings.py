"""A saga is whole at its end, however its messages were shuffled, repeated, delayed and overlapped.

And the test of the test: with any one guard taken out of the journal, the same plays find a saga
that is not whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from random import Random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from saga import store
from saga.journal import ClaimedRun, PeersOfSaga, RunKey, SagaRow, SagaState, StepRow, StepState
from saga.store import SqlJournal
from tests.interleaving import play
from tests.overlapping import StoppingParticipant
from tests.sagas import Shop

PLAYS_TO_FIND_A_MUTANT = 250


@pytest.fixture(scope="module")
def engine(shared_engine: Engine) -> Engine:
    return shared_engine


@pytest.fixture(scope="module")
def shop(engine: Engine) -> Shop:
    return Shop(engine, StoppingParticipant)


@pytest.fixture(scope="module")
def eager(engine: Engine) -> Shop:
    return Shop(engine, StoppingParticipant, unwind="eager")


@settings(
    max_examples=120,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_every_saga_ends_whole_whatever_comes_when_and_how_often(
    shop: Shop, eager: Shop, data: st.DataObject
) -> None:
    shop = shop if data.draw(st.booleans(), label="in reverse order") else eager
    shop.reset()
    end = play(shop, lambda below: data.draw(st.integers(0, below - 1)))
    assert end in ("completed", "compensated")


def test_the_plays_do_see_both_ends(shop: Shop) -> None:
    ends = {play(shop, Random(seed).randrange) for seed in range(10)}
    assert ends == {"completed", "compensated"}


# ---- the guards, each taken out ----

Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Patch] = {}


def from_anywhere(statement: str) -> str:
    """The statement without its look at the state that the row is in."""
    unguarded = statement.replace("AND state = %s", "AND CAST(%s AS text) IS NOT NULL")
    assert unguarded != statement
    return unguarded


def mutant(function: Patch) -> Patch:
    MUTANTS[function.__name__] = function
    return function


@mutant
def the_tombstone_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    real = SqlJournal.lock

    def lock(self: SqlJournal, saga_id: UUID) -> SagaRow:
        saga = real(self, saga_id)
        if self._participant == "order" or saga.state is not SagaState.COMPENSATED:
            return saga
        return replace(saga, state=SagaState.COMPLETED)

    patch.setattr(SqlJournal, "lock", lock)


@mutant
def the_sagas_row_is_not_locked(patch: pytest.MonkeyPatch) -> None:
    assert "FOR UPDATE" in store._LOCK_SAGA
    patch.setattr(store, "_LOCK_SAGA", store._LOCK_SAGA.replace("FOR UPDATE", ""))


@mutant
def a_join_does_not_look_for_an_abort(patch: pytest.MonkeyPatch) -> None:
    real = SqlJournal.lock
    without_check = from_anywhere(store._MOVE_SAGA)

    def lock(self: SqlJournal, saga_id: UUID) -> SagaRow:
        saga = real(self, saga_id)
        if self._participant != "order" or not saga.state.aborted:
            return saga
        return replace(saga, state=SagaState.RUNNING)

    patch.setattr(SqlJournal, "lock", lock)
    patch.setattr(store, "_MOVE_SAGA", without_check)


@mutant
def a_join_fires_again(patch: pytest.MonkeyPatch) -> None:
    forget_runs(patch, lambda key: key.step in ("prepare", "confirm"))
    real = SqlJournal.lock

    def lock(self: SqlJournal, saga_id: UUID) -> SagaRow:
        saga = real(self, saga_id)
        completed = self._participant == "order" and saga.state is SagaState.COMPLETED
        return replace(saga, state=SagaState.RUNNING) if completed else saga

    patch.setattr(SqlJournal, "lock", lock)
    without_check = from_anywhere(store._MOVE_SAGA)
    patch.setattr(store, "_MOVE_SAGA", without_check)


@mutant
def a_step_does_not_look_whether_it_ran(patch: pytest.MonkeyPatch) -> None:
    forget_runs(patch, lambda key: key.step == "act")


@mutant
def a_rejection_keeps_what_the_step_wrote(patch: pytest.MonkeyPatch) -> None:
    def savepoint(self: SqlJournal) -> AbstractContextManager[Any]:
        return nullcontext()

    patch.setattr(SqlJournal, "savepoint", savepoint)


@mutant
def a_compensation_does_not_look_whether_it_ran(patch: pytest.MonkeyPatch) -> None:
    real = SqlJournal.claim

    def claim(self: SqlJournal, key: RunKey) -> ClaimedRun | None:
        run = real(self, key)
        return None if run is None else replace(run, state=StepState.COMPENSATING)

    patch.setattr(SqlJournal, "claim", claim)
    without_check = from_anywhere(store._ADVANCE_RUN)
    patch.setattr(store, "_ADVANCE_RUN", without_check)


@mutant
def an_abort_forgets_what_was_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SqlJournal, "runs", lambda self, saga_id: [])


@mutant
def a_step_is_undone_before_what_it_caused_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SqlJournal, "peers_of", lambda self, saga_id: PeersOfSaga({}, {}))


@mutant
def a_step_is_undone_before_what_it_caused_here(patch: pytest.MonkeyPatch) -> None:
    real = SqlJournal.runs

    def runs(self: SqlJournal, saga_id: UUID) -> list[StepRow]:
        return [replace(run, causes=frozenset()) for run in real(self, saga_id)]

    patch.setattr(SqlJournal, "runs", runs)


@mutant
def the_first_word_of_a_peer_is_its_last(patch: pytest.MonkeyPatch) -> None:
    real = SqlJournal.peers_of

    def peers_of(self: SqlJournal, saga_id: UUID) -> PeersOfSaga:
        peers = real(self, saga_id)
        return replace(peers, heard=dict.fromkeys(peers.heard, frozenset()))

    patch.setattr(SqlJournal, "peers_of", peers_of)


ORDER_GUARDS = (
    "a_step_is_undone_before_what_it_caused_elsewhere",
    "a_step_is_undone_before_what_it_caused_here",
    "the_first_word_of_a_peer_is_its_last",
)


def forget_runs(patch: pytest.MonkeyPatch, which: Callable[[RunKey], bool]) -> None:
    """`find` finds nothing, and the primary key that would notice is got around."""
    real = SqlJournal.find

    def find(self: SqlJournal, key: RunKey) -> StepState | None:
        return None if which(key) else real(self, key)

    patch.setattr(SqlJournal, "find", find)
    patch.setattr(store, "_INSERT_RUN", store._INSERT_RUN.rstrip() + " ON CONFLICT DO NOTHING")


@pytest.mark.parametrize("guard", MUTANTS)
def test_a_journal_without_one_of_its_guards_is_found_out(
    shop: Shop, eager: Shop, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    MUTANTS[guard](monkeypatch)
    # Eager unwinding lets more come at the same time; only the order itself has a guard of its own.
    shop = shop if guard in ORDER_GUARDS else eager
    shop.reset()
    for seed in range(PLAYS_TO_FIND_A_MUTANT):
        try:
            play(shop, Random(seed).randrange)
        except Exception as error:
            print(f"found in play {seed + 1}: {error!r}"[:300])
            return
    pytest.fail(f"{PLAYS_TO_FIND_A_MUTANT} plays did not notice that {guard}")
