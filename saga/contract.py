"""What one service promises and expects, as a file: so that services in separate repositories can be
checked together.

`saga export` writes it, `saga check` and `saga diff` read it. It holds the declarations with their
places in the source, and the JSON Schema of every event that the service writes or reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from outbox.errors import ConfigurationError
from outbox.events import EventType, Registry, brief
from outbox.service import Handler, Service
from saga.choreography import EventRef, ParticipantSpec, Place, Plain
from saga.participant import Participant

FORMAT: Final = 1


@dataclass(frozen=True)
class EventContract:
    """One event type in one version, as one service knows it."""

    event: EventRef
    key: str | None
    ordered: bool
    accepted: dict[str, Any]
    """JSON Schema of the payloads that it can read."""
    written: dict[str, Any]
    """JSON Schema of the payloads that it writes."""
    reads: tuple[int, ...]
    """The versions that it reads as this one, upcasters included."""


@dataclass(frozen=True)
class Contract:
    """One service's declarations and events. A plain service has no starts, steps or joins."""

    participant: ParticipantSpec
    events: tuple[EventContract, ...]
    subscriptions: tuple[Plain, ...] = ()
    """What it takes without being part of the saga."""
    publications: tuple[Plain, ...] = ()
    """What it says by plain publishing."""
    format: int = FORMAT

    @property
    def name(self) -> str:
        return self.participant.name

    @property
    def subscribes(self) -> tuple[EventRef, ...]:
        return tuple(one.event for one in self.subscriptions)

    @property
    def publishes(self) -> tuple[EventRef, ...]:
        return tuple(one.event for one in self.publications)

    @property
    def takes(self) -> tuple[EventRef, ...]:
        """What it takes, inside of sagas and outside."""
        spec = self.participant
        refs = [step.on for step in spec.steps]
        refs += [ref for join in spec.joins for ref in join.on]
        return tuple(dict.fromkeys([*refs, *self.subscribes]))

    @property
    def says(self) -> tuple[EventRef, ...]:
        """What it is declared to emit, to reject with or to publish."""
        spec = self.participant
        refs = [start.event for start in spec.starts]
        for step in spec.steps:
            refs += [*step.emits, *step.rejects]
        for join in spec.joins:
            refs += [*join.emits, *join.rejects]
        for deadline in spec.deadlines:
            refs += deadline.rejects
        return tuple(dict.fromkeys([*refs, *self.publishes]))

    def event(self, ref: EventRef) -> EventContract | None:
        return next((event for event in self.events if event.event == ref), None)

    def read_as(self, ref: EventRef) -> EventContract | None:
        """What an event is read as here, once its upcasters have run; None where it cannot be read."""
        return next(
            (
                event
                for event in self.events
                if event.event.name == ref.name and ref.version in event.reads
            ),
            None,
        )


_ADAPTER: Final = TypeAdapter(Contract)


def contract_of(service: Service) -> Contract:
    """The contract of a participant, or of a plain service, as it is declared in this process."""
    spec = (
        service.spec
        if isinstance(service, Participant)
        else ParticipantSpec(service.name, (), (), ())
    )
    published = [
        Plain(EventRef.to(event_type), Place(*defined_at))
        for event_type, defined_at in service.published.items()
    ]
    bare = Contract(spec, (), _once(_subscriptions(service, spec)), _once(published))
    mentioned = {ref.name for ref in (*bare.takes, *bare.says)}
    events = [
        _event_contract(event_type, service.registry)
        for event_type in service.registry
        if event_type.name in mentioned
    ]
    ordered = tuple(sorted(events, key=lambda one: one.event))
    return replace(bare, events=ordered)


def to_json(contract: Contract) -> str:
    """The contract as JSON text, the same for the same declarations; paths are relative to the
    working directory where they are below it."""
    plain = _with_relative_places(_ADAPTER.dump_python(contract, mode="json"))
    return json.dumps(plain, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def read_contract(path: Path) -> Contract:
    """Read a contract file. Raises `ConfigurationError` where it is none, or of a later format."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    _refuse_later_format(path, text)
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(
            f"{path} is no contract (saga export makes one): {brief(error)}"
        ) from error


def relative(file: str) -> str:
    """*file* as seen from the working directory, if it is below it."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _refuse_later_format(path: Path, text: bytes) -> None:
    # Before the rest is looked at: a later format may look like anything.
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return
    version = found.get("format") if isinstance(found, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ConfigurationError(
            f"{path} has format {version} and this release reads up to {FORMAT}: upgrade outbox-saga"
        )


def _once(plain: Iterable[Plain]) -> tuple[Plain, ...]:
    """Each event once, at its first place."""
    firsts: dict[EventRef, Plain] = {}
    for one in plain:
        firsts.setdefault(one.event, one)
    return tuple(firsts[event] for event in sorted(firsts))


def _subscriptions(service: Service, spec: ParticipantSpec) -> Iterator[Plain]:
    names = [*(step.name for step in spec.steps), *(join.name for join in spec.joins)]
    reactions = {f"{spec.name}.{name}" for name in names}
    plain = set(service.subscriptions if isinstance(service, Participant) else service.bindings)
    for handler in service.handlers:
        if handler.subscribes and handler.name not in reactions:
            for name in sorted(handler.event_types & plain):
                yield from _taken_by(handler, name, service.registry)


def _taken_by(handler: Handler, name: str, registry: Registry) -> Iterator[Plain]:
    place = None if handler.defined_at is None else Place(*handler.defined_at)
    for event_type in registry:
        ref = EventRef.to(event_type)
        wanted = not handler.versions or (ref.name, ref.version) in handler.versions
        if ref.name == name and wanted:
            yield Plain(ref, place)


def _event_contract(event_type: EventType, registry: Registry) -> EventContract:
    return EventContract(
        event=EventRef.to(event_type),
        key=event_type.key if isinstance(event_type.key, str | None) else "(function)",
        ordered=event_type.ordered,
        accepted=_json_schema(event_type, "validation"),
        written=_json_schema(event_type, "serialization"),
        reads=tuple(
            version
            for version in range(1, event_type.version + 1)
            if _becomes(event_type.name, version, registry) == event_type.version
        ),
    )


def _becomes(name: str, version: int, registry: Registry) -> int:
    while registry.upcasts_from(name, version):
        version += 1
    return version


def _json_schema(
    event_type: EventType, mode: Literal["validation", "serialization"]
) -> dict[str, Any]:
    try:
        return event_type.adapter.json_schema(mode=mode)
    except PydanticUserError as error:
        raise ConfigurationError(
            f"{event_type} has no JSON Schema, so its contract cannot be told: {error.message}"
        ) from error


def _with_relative_places(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"file", "line"}:
            return {**value, "file": relative(value["file"])}
        return {name: _with_relative_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_relative_places(item) for item in value]
    return value
