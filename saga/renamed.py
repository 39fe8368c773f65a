"""Steps and joins that had another name: what stands under the old one is theirs.

`step(..., was="old_name")` is for a deployment. Journal rows, kept arrivals, retries, dead letters
and compensations of the old name belong to the new one. Why nothing runs twice, also while workers
of both versions run: every run looks, under the saga's lock, whether it stands in the journal under
any of its names, and goes on under the name that it finds. A new run is written down under the new
name, with a row that says *skipped* under each old one, which is what a worker of the old version
finds. What is owed to an old name, or stands under it, runs under it, so that the idempotency key of
a run stays the same. An arrival for a join is written under all its names, so that whichever version
counts last counts them all, and only one of the two finds no run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from outbox.envelope import Envelope
from saga.context import Emission
from saga.journal import RunKey, StepState
from saga.reaction import Reaction
from saga.store import SqlJournal

Names = Mapping[str, tuple[str, ...]]
"""Old names by the name of today."""


class RenamedJournal(SqlJournal):
    """A journal in which some steps have old names as well."""

    def __init__(
        self, session: Any, participant: str, schema: str, *, decides: bool, was: Names
    ) -> None:
        super().__init__(session, participant, schema, decides=decides)
        self._was = was
        self._found: dict[RunKey, RunKey] = {}

    def find(self, key: RunKey) -> StepState | None:
        for name in self._names_of(key.step):
            known = RunKey(key.saga_id, name, key.trigger_id)
            state = super().find(known)
            if state is not None:
                self._found[key] = known
                return state
        return None

    def known_as(self, key: RunKey) -> RunKey:
        return self._found.get(key, key)

    def record(
        self,
        key: RunKey,
        before: StepState | None,
        after: StepState,
        *,
        trigger: bytes,
        emitted: bytes | None = None,
        published: Sequence[Emission] = (),
        reason: str | None = None,
    ) -> None:
        super().record(
            self.known_as(key), before, after,
            trigger=trigger, emitted=emitted, published=published, reason=reason,
        )  # fmt: skip
        for old in self._was.get(key.step, ()) if before is None else ():
            said = RunKey(key.saga_id, old, key.trigger_id)
            reason = f"it ran as {key.step}, which was {old}"
            super().record(said, None, StepState.SKIPPED, trigger=trigger, reason=reason)

    def verdict(self, key: RunKey) -> str | None:
        return super().verdict(self.known_as(key))

    def arrive(self, saga_id: UUID, join: str, envelope: Envelope) -> None:
        for name in (join, *self._was.get(join, ())):
            super().arrive(saga_id, name, envelope)

    def arrivals(self, saga_id: UUID, join: str) -> dict[str, bytes]:
        arrived: dict[str, bytes] = {}
        for name in self._names_of(join):
            arrived |= super().arrivals(saga_id, name)
        return arrived

    def _arrived(self, saga_id: UUID) -> dict[str, set[UUID]]:
        arrived = super()._arrived(saga_id)
        return {
            name: set().union(*(arrived.get(one, ()) for one in self._names_of(name)))
            for name in {*arrived, *self._was}
            if any(one in arrived for one in self._names_of(name))
        }

    def _names_of(self, name: str) -> tuple[str, ...]:
        """All names of what has, or had, this one; the oldest last, whose arrivals came first."""
        for now, old in self._was.items():
            if name == now or name in old:
                return (now, *old)
        return (name,)


def names(reactions: Iterable[Reaction[..., Any]]) -> Names:
    return {one.name: one.was for one in reactions if one.was}
