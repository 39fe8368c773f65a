"""Events and who takes them: what is said is heard, what is heard is said, and both mean the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from saga.choreography import EventRef, Place
from saga.contract import Contract
from saga.findings import Finding, error, listed, place_of, warning
from saga.flow import Flow
from saga.schemas import unreadable

_CONTROL: Final = "saga."
"""What the runtime itself says to everyone."""


def one_name_twice(flow: Flow) -> Iterator[Finding]:
    """A service's name stands in its inbox, its journal and its queue."""
    seen: set[str] = set()
    for contract in flow.contracts:
        if contract.name in seen:
            yield error(
                "same-name",
                f"two services are named {contract.name}: they would share a queue and a journal",
                place_of(contract),
            )
        seen.add(contract.name)


def unheard_event(flow: Flow) -> Iterator[Finding]:
    """A produced event has a consumer, or is declared as said to whoever cares (`publishes`); what
    a completing action says at the end needs neither."""
    for action in flow.actions:
        for name in action.answers:
            heard = name in flow.consumers or name in flow.subscribers
            is_terminal = action.completes or name in flow.publishers
            if not heard and not is_terminal:
                yield error(
                    "unheard-event",
                    f"{action} emits {name}, and nobody takes it: bind a step, a join or a "
                    f"subscriber to it, emit nothing, or say {action.participant}.publishes(...) "
                    "where it is for whoever cares",
                    action.place,
                )


def unproduced_event(flow: Flow) -> Iterator[Finding]:
    """A consumed event has a producer."""
    rejections = _rejections(flow)
    for action in flow.actions:
        for ref in action.on:
            if ref.name not in flow.producers and ref.name not in rejections:
                publishers = listed(one.name for one in flow.publishers.get(ref.name, ()))
                remedy = (
                    f"{publishers} publishes it outside of sagas: start one with it, or emit it"
                    if publishers
                    else "declare who does, or check its contract together with these"
                )
                yield error(
                    "unproduced-event",
                    f"{action} takes {ref.name}, and nobody emits it: {remedy}",
                    action.place,
                )
    said = {*flow.producers, *rejections, *flow.publishers}
    for contract in flow.contracts:
        for one in contract.subscriptions:
            name = one.event.name
            if name not in said and not name.startswith(_CONTROL):
                yield warning(
                    "unproduced-event",
                    f"{contract.name} subscribes to {name}, and no declaration says who emits it: "
                    "the service that publishes it can say so with service.publishes(...)",
                    one.place,
                )


def rejection_leads_on(flow: Flow) -> Iterator[Finding]:
    """A rejection is the end: no step of that saga runs after it."""
    rejections = _rejections(flow)
    for action in flow.actions:
        for ref in action.on:
            if ref.name in rejections:
                yield error(
                    "rejection-leads-on",
                    f"{action} takes {ref.name}, with which {rejections[ref.name]} rejects; that "
                    f"aborts the saga, so nothing runs after it: undo in a compensation, or take "
                    f"it outside of the saga (@{action.participant}.on)",
                    action.place,
                )


def version_not_read(flow: Flow) -> Iterator[Finding]:
    """A producer's version is one that each of its consumers is given."""
    for said, consumer in _meetings(flow):
        ref, read = said.event, consumer.read_as(said.event)
        if read is None:
            problem = f"{consumer.name} can read no such version"
        elif not _is_given(consumer, read.event):
            problem = f"{consumer.name} reads it as v{read.event.version}, which it does not take"
        else:
            continue
        yield error(
            "version",
            f"{said.by} says {ref}, and {problem}: deploy the reader (or an upcaster) first",
            _place_of_taker(consumer, ref) or said.place,
        )


def _is_given(consumer: Contract, read: EventRef) -> bool:
    """Whether all that takes events of that name takes this version; what does not is parked."""
    spec = consumer.participant
    taken = [step.on for step in spec.steps] + [ref for join in spec.joins for ref in join.on]
    plain = [ref for ref in consumer.subscribes if ref.name == read.name]
    return all(ref == read for ref in taken if ref.name == read.name) and (
        not plain or read in plain
    )


def schemas_disagree(flow: Flow) -> Iterator[Finding]:
    """What is written under a name and version can be read by everyone who takes it."""
    by_name = {contract.name: contract for contract in flow.contracts}
    for said, consumer in _meetings(flow):
        ref = said.event
        written, read = by_name[said.service].event(ref), consumer.event(ref)
        if written is None or read is None or ref not in consumer.takes:
            continue
        problems = unreadable(written.written, read.accepted)
        if read.ordered and not written.ordered:
            problems.append("its events are expected in order and written without")
        if problems:
            yield error(
                "schema",
                f"{said.by} and {consumer.name} disagree on {ref}: {'; '.join(problems)}",
                _place_of_taker(consumer, ref) or said.place,
            )


def two_producers(flow: Flow) -> Iterator[Finding]:
    """A type of event that leads on is emitted in one place of a saga, so that it tells where the
    saga stands."""
    for saga in flow.sagas:
        for name in flow.consumers:
            inside = [action for action in saga.actions if name in action.answers]
            if len(inside) > 1:
                yield warning(
                    "two-producers",
                    f"in {saga}, {name} is emitted by {listed(inside)}: who takes it cannot tell "
                    "where the saga stands",
                    inside[1].place,
                )


@dataclass(frozen=True)
class _Said:
    """An event and who says it: an action of a service, or the service by plain publishing."""

    by: str
    service: str
    event: EventRef
    place: Place | None


def _said(flow: Flow) -> Iterator[_Said]:
    for action in flow.actions:
        for ref in (*action.emits, *action.rejects):
            yield _Said(str(action), action.participant, ref, action.place)
    for deadline in flow.deadlines:
        name = f"{deadline.participant}.{deadline.name}"
        for ref in deadline.rejects:
            yield _Said(name, deadline.participant, ref, deadline.place)
    for contract in flow.contracts:
        for one in contract.publications:
            yield _Said(contract.name, contract.name, one.event, one.place)


def _meetings(flow: Flow) -> Iterator[tuple[_Said, Contract]]:
    """Who says what, and who takes it, each pair of services once."""
    seen: set[tuple[str, EventRef, str]] = set()
    for said in _said(flow):
        for consumer in flow.contracts:
            taken = any(one.name == said.event.name for one in consumer.takes)
            pair = (said.service, said.event, consumer.name)
            if taken and pair not in seen:
                seen.add(pair)
                yield said, consumer


def _place_of_taker(consumer: Contract, ref: EventRef) -> Place | None:
    spec = consumer.participant
    takers = [step.place for step in spec.steps if step.on.name == ref.name]
    takers += [join.place for join in spec.joins if ref.name in {one.name for one in join.on}]
    plain = [one.place for one in consumer.subscriptions if one.event.name == ref.name]
    takers += [place for place in plain if place is not None]
    return min(takers, default=None)


def _rejections(flow: Flow) -> dict[str, str]:
    found = {ref.name: str(action) for action in flow.actions for ref in action.rejects}
    for one in flow.deadlines:
        found.update({ref.name: f"{one.participant}.{one.name}" for ref in one.rejects})
    return found


RULES: Final[tuple[Callable[[Flow], Iterator[Finding]], ...]] = (
    one_name_twice,
    unheard_event,
    unproduced_event,
    rejection_leads_on,
    version_not_read,
    schemas_disagree,
    two_producers,
)
