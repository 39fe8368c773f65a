"""What one participant promises and expects, as a file: so that services in separate repositories are checked together.

`saga export` writes it, `saga check` reads it. It holds the declarations with their places in the source, and the JSON
Schema of every event that the participant writes or reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError

from outbox.errors import ConfigurationError
from outbox.events import EventType, Registry
from saga.choreography import EventRef, ParticipantSpec

if TYPE_CHECKING:
    from saga.participant import Participant

FORMAT: Final = 1


@dataclass(frozen=True)
class EventContract:
    """One event type as one participant knows it."""

    event: EventRef
    key: str | None
    ordered: bool
    schema: dict[str, Any]
    """JSON Schema of the payload."""
    reads: tuple[int, ...] = ()
    """The versions that this participant can read, upcasters included."""


@dataclass(frozen=True)
class Contract:
    """One participant's declarations and events."""

    participant: ParticipantSpec
    events: tuple[EventContract, ...]
    subscribes: tuple[str, ...] = ()
    """Event types that it takes without being part of the saga."""
    format: int = FORMAT

    def event(self, ref: EventRef) -> EventContract | None:
        return next((event for event in self.events if event.event == ref), None)


_ADAPTER: Final = TypeAdapter(Contract)


def contract_of(participant: Participant) -> Contract:
    """The contract of a participant as it is declared in this process."""
    spec = participant.spec
    mentioned = {ref.name for ref in _refs(spec)} | set(participant.subscriptions)
    events = [
        _event_contract(event_type, participant.registry)
        for event_type in participant.registry
        if event_type.name in mentioned
    ]
    return Contract(
        participant=spec,
        events=tuple(sorted(events, key=lambda event: event.event)),
        subscribes=tuple(sorted(participant.subscriptions)),
    )


def to_json(contract: Contract) -> str:
    """The contract as JSON text, the same for the same declarations; paths are relative to here where they can be."""
    plain = _ADAPTER.dump_python(contract, mode="json")
    return (
        json.dumps(_with_relative_places(plain), indent=2, ensure_ascii=False, sort_keys=True)
        + "\n"
    )


def read_contract(path: Path) -> Contract:
    """Read a contract file. Raises `ConfigurationError` where it is none, or of a format of later releases."""
    try:
        contract = _ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} is no contract: {error}") from error
    if contract.format > FORMAT:
        raise ConfigurationError(
            f"{path} has format {contract.format}; this release reads up to {FORMAT}"
        )
    return contract


def _event_contract(event_type: EventType, registry: Registry) -> EventContract:
    own = {known.version for known in registry if known.name == event_type.name}
    upcast = {
        version for version in range(1, max(own)) if registry.upcasts_from(event_type.name, version)
    }
    key = (
        event_type.key
        if isinstance(event_type.key, str) or event_type.key is None
        else "(function)"
    )
    return EventContract(
        event=EventRef.to(event_type),
        key=key,
        ordered=event_type.ordered,
        schema=event_type.adapter.json_schema(),
        reads=tuple(sorted(own | upcast)),
    )


def _refs(spec: ParticipantSpec) -> Iterable[EventRef]:
    for start in spec.starts:
        yield start.event
    for step in spec.steps:
        yield from (step.on, *step.emits, *step.rejects)
    for join in spec.joins:
        yield from (*join.on, *join.emits, *join.rejects)


def _with_relative_places(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"file", "line"}:
            return {**value, "file": relative(value["file"])}
        return {name: _with_relative_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_relative_places(item) for item in value]
    return value


def relative(file: str) -> str:
    """*file* as seen from the working directory, if it is below it."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
