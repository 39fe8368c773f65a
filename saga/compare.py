"""`saga diff`: what a saga that is in flight would meet, were the new version deployed now.

In flight are: events on their way to a step or a join, deliveries that are owed to a handler by its
name, events that a join has kept, and journal rows that a compensation will read one day. Each rule
asks what becomes of one of these. An *error* is work that would be lost, or stuck until a later
deployment; a *warning* is a change that someone else has to be ready for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from saga.choreography import EventRef, JoinSpec, Place, StartSpec, StepSpec
from saga.contract import Contract
from saga.findings import Finding, error, in_order, listed, place_of, warning
from saga.schemas import unreadable

Reaction = StepSpec | JoinSpec


def compare(old: Contract, new: Contract) -> list[Finding]:
    """What of *old* would be hurt by *new*, errors first; places are those of the new version."""
    if old.name != new.name:
        return [
            error(
                "participant-renamed",
                f"{old.name} became {new.name}: its queue, its inbox and its journal bear the old "
                "name, so nothing that is in flight finds it",
                place_of(new),
            )
        ]
    findings = [*_starts(old, new), *_reactions(old, new), *_events(old, new)]
    findings += _deadlines(old, new)
    return in_order([*findings, *_subscriptions(old, new)])


def _reactions(old: Contract, new: Contract) -> Iterator[Finding]:
    now = _by_name(new)
    known_as = {name: one for one in now.values() for name in (*one.was, one.name)}
    for name, before in _by_name(old).items():
        after = known_as.get(name)
        if after is None:
            yield _removed(old, new, before)
            continue
        yield from _alias_dropped(before, after)
        yield from _trigger(before, after)
        yield from _answers(before, after)
        yield from _calling(before, after)
        yield from _undoing(before, after, _name(after))
        yield from _aborting(before, after)
        if _completes(before) != _completes(after):
            yield error(
                "decision-moved",
                f"{_name(after)} {'completes' if _completes(after) else 'no longer completes'} the "
                "saga: one that is in flight would be decided twice, or never",
                after.place,
            )
    before_that = _by_name(old)
    heirs = [_heir(old, new, one) for name, one in before_that.items() if name not in known_as]
    for name, added in now.items():
        if added not in heirs and not before_that.keys() & {name, *added.was}:
            yield _added(added)


def _added(added: Reaction) -> Finding:
    effect = (
        f"a saga whose {added.on.name} came before the deployment goes on without it"
        if isinstance(added, StepSpec)
        else "a saga some of whose events came before the deployment never wakes it"
    )
    return warning("step-added", f"{_name(added)} is new: {effect}", added.place)


def _alias_dropped(before: Reaction, after: Reaction) -> Iterator[Finding]:
    dropped = [name for name in before.was if name not in (*after.was, after.name)]
    if dropped:
        yield warning(
            "alias-dropped",
            f"{_name(after)} does not say any more that it was {listed(dropped)}: no saga may be "
            "open that began under that name",
            after.place,
        )


def _removed(old: Contract, new: Contract, before: Reaction) -> Finding:
    heir = _heir(old, new, before)
    if heir is not None:
        return error(
            "step-renamed",
            f"{_name(before)} seems to have become {_name(heir)}: an event that it has handled "
            "would be new to that name, and its retries, redrives and compensations are owed to "
            f'the old one; say was="{before.name}", or keep the name with name="{before.name}"',
            heir.place,
        )
    return error(
        "step-removed",
        f"{_name(before)} is gone: events on their way to it are not handled, its retries and "
        "redrives find no handler, and sagas that have to undo it are stuck; keep it until no saga "
        "is open",
        place_of(new),
    )


def _heir(old: Contract, new: Contract, gone: Reaction) -> Reaction | None:
    """The new reaction to the same events, if there is one."""
    return next(
        (
            one
            for name, one in _by_name(new).items()
            if name not in _by_name(old) and set(_names(_on(one))) == set(_names(_on(gone)))
        ),
        None,
    )


def _trigger(before: Reaction, after: Reaction) -> Iterator[Finding]:
    if isinstance(before, StepSpec) != isinstance(after, StepSpec):
        kinds = ("step", "join") if isinstance(before, StepSpec) else ("join", "step")
        yield error(
            "trigger-changed",
            f"{_name(after)} was a {kinds[0]} and is a {kinds[1]}: its journal rows mean something "
            "else; give the new one another name",
            after.place,
        )
        return
    was, now = _names(_on(before)), _names(_on(after))
    if lost := [name for name in was if name not in now]:
        effect = (
            "a saga that has all the others is not woken any more"
            if isinstance(after, JoinSpec)
            else "those on their way are not handled"
        )
        yield error(
            "trigger-changed",
            f"{_name(after)} no longer takes {listed(lost)}: {effect}",
            after.place,
        )
    if isinstance(before, JoinSpec) and isinstance(after, JoinSpec):
        enough = [one.needs or len(one.on) for one in (before, after)]
        if set(now) == set(was) and enough[1] < enough[0]:
            yield warning(
                "trigger-changed",
                f"join {_name(after)} needs {enough[1]} of its events where it needed {enough[0]}: a "
                "saga that has as many already is woken only by the next one",
                after.place,
            )
    added = [name for name in now if name not in was]
    if added and isinstance(after, JoinSpec):
        yield error(
            "trigger-changed",
            f"join {_name(after)} also waits for {listed(added)}, which a saga in flight may never "
            "have asked for",
            after.place,
        )


def _answers(before: Reaction, after: Reaction) -> Iterator[Finding]:
    was, now = _names(before.emits), _names(after.emits)
    if lost := [name for name in was if name not in now]:
        yield error(
            "emits-changed",
            f"{_name(after)} no longer emits {listed(lost)}: who waits for it in an open saga "
            "waits for ever",
            after.place,
        )
    if bool(was) != bool(now) and after.compensation is not None:
        yield error(
            "emits-changed",
            f"{_name(after)} emits {'nothing' if not now else 'an event'} where it emitted "
            f"{'an event' if was else 'nothing'}: its compensation takes other arguments than "
            "the journal has for runs that are done",
            after.compensation,
        )
    elif added := [name for name in now if name not in was]:
        yield warning(
            "emits-changed",
            f"{_name(after)} may emit {listed(added)} now: deploy who takes it first",
            after.place,
        )
    for ref in after.emits:
        older = [one for one in before.emits if one.name == ref.name]
        if older and ref not in older:
            yield warning(
                "version-raised",
                f"{_name(after)} emits {ref} where it emitted {listed(older)}: deploy its readers "
                "(or their upcasters) first",
                after.place,
            )


def _calling(before: Reaction, after: Reaction) -> Iterator[Finding]:
    if not isinstance(before, StepSpec) or not isinstance(after, StepSpec):
        return
    if before.external and not after.external:
        yield error(
            "external-changed",
            f"{_name(after)} is external no more: a saga with a call whose result is not written "
            "down yet is stuck until a person resolves it; give the new step another name",
            after.place,
        )
    elif before.resolves and not after.resolves:
        yield warning(
            "external-changed",
            f"{_name(after)} has no resolve hook any more: calls without a result wait for a person",
            after.place,
        )


def _aborting(before: Reaction, after: Reaction) -> Iterator[Finding]:
    added = [name for name in _names(after.rejects) if name not in _names(before.rejects)]
    if added:
        yield warning(
            "new-rejection",
            f"{_name(after)} may reject with {listed(added)} now: what comes before it, also in "
            "other services, must be able to undo (saga check tells)",
            after.place,
        )
    if after.exhausted == "abort" and before.exhausted != "abort":
        yield warning(
            "new-rejection",
            f"{_name(after)} aborts the saga now when its attempts are used up: what comes before "
            "it must be able to undo (saga check tells)",
            after.place,
        )


def _undoing(
    before: Reaction | StartSpec, after: Reaction | StartSpec, name: str
) -> Iterator[Finding]:
    if before.compensation is None or after.compensation is not None:
        return
    if after.nothing_to_undo is None:
        yield error(
            "compensation-removed",
            f"{name} has no compensation any more: a saga that has done it cannot be undone",
            after.place,
        )
    else:
        yield warning(
            "compensation-removed",
            f"{name} has nothing to undo now ({after.nothing_to_undo}): that must hold as well "
            "for what the old version has done",
            after.place,
        )


def _starts(old: Contract, new: Contract) -> Iterator[Finding]:
    now = {start.event.name: start for start in new.participant.starts}
    for before in old.participant.starts:
        after = now.get(before.event.name)
        if after is not None:
            yield from _undoing(before, after, f"the start of {before.event.name}")
        elif before.compensation is not None:
            yield error(
                "start-removed",
                f"{old.name} no longer starts sagas with {before.event.name}: those that are open "
                "cannot be undone here; keep its compensation until none is",
                place_of(new),
            )


def _deadlines(old: Contract, new: Contract) -> Iterator[Finding]:
    now = {one.name for one in new.participant.deadlines}
    for before in old.participant.deadlines:
        if before.name not in now:
            yield warning(
                "deadline-removed",
                f"the deadline {old.name}.{before.name} is gone: those that are owed find no handler "
                "and become dead letters, and nothing aborts their sagas in time",
                place_of(new),
            )


def _events(old: Contract, new: Contract) -> Iterator[Finding]:
    """What is on its way, kept by a join, or in the journal can still be read."""
    needed = {ref.name for ref in old.takes} | {ref.name for ref in _kept_for_compensations(old)}
    still = {ref.name for ref in (*new.takes, *new.says)}
    for known in old.events:
        if known.event.name not in needed & still:
            continue
        for version in known.reads:
            yield from _one_version(old, new, EventRef(known.event.name, version))


def _one_version(old: Contract, new: Contract, ref: EventRef) -> Iterator[Finding]:
    read = new.read_as(ref)
    if read is None:
        yield error(
            "version-dropped",
            f"{new.name} can no longer read {ref}, which may be on its way or in the journal: "
            "keep the class or add an upcaster",
            _place_of(new, ref.name),
        )
        return
    before = old.event(ref)
    # An upcaster stands between the two otherwise, and what it adds cannot be told.
    if before is None or read.event != ref:
        return
    # Of what others write, all that is known here is what was accepted so far.
    written = before.accepted if ref in old.takes else before.written
    if problems := unreadable(written, read.accepted):
        yield error(
            "schema-changed",
            f"{ref} as it was written before cannot be read any more: {'; '.join(problems)}; "
            "give the field a default, or make a new version with an upcaster",
            _place_of(new, ref.name),
        )


def _kept_for_compensations(contract: Contract) -> Iterator[EventRef]:
    spec = contract.participant
    for start in spec.starts:
        if start.compensation is not None:
            yield start.event
    for one in _by_name(contract).values():
        if one.compensation is not None:
            yield from one.emits


def _subscriptions(old: Contract, new: Contract) -> Iterator[Finding]:
    now = set(_names(new.takes))
    taken_by_reactions = {name for one in _by_name(old).values() for name in _names(_on(one))}
    for name in _names(old.subscribes):
        if name not in now and name not in taken_by_reactions:
            yield warning(
                "subscription-dropped",
                f"{new.name} no longer takes {name}: those on their way are not handled",
                place_of(new),
            )


def _by_name(contract: Contract) -> dict[str, Reaction]:
    spec = contract.participant
    reactions: list[Reaction] = [*spec.steps, *spec.joins]
    return {one.name: one for one in reactions}


def _on(one: Reaction) -> tuple[EventRef, ...]:
    return (one.on,) if isinstance(one, StepSpec) else one.on


def _completes(one: Reaction) -> bool:
    return one.completes if isinstance(one, JoinSpec) else one.pivot


def _name(one: Reaction) -> str:
    return f"{one.participant}.{one.name}"


def _names(refs: Sequence[EventRef]) -> list[str]:
    return list(dict.fromkeys(ref.name for ref in refs))


def _place_of(contract: Contract, event: str) -> Place | None:
    spec = contract.participant
    places = [one.place for one in _by_name(contract).values() if event in _names(_on(one))]
    places += [one.place for one in spec.starts if one.event.name == event]
    return min(places, default=place_of(contract))
