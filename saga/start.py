"""Starting a saga: the caller's own writes, the journal and the first event, in one transaction."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from outbox import context
from outbox.ids import new_id
from saga.declaration import start_name
from saga.errors import AlreadyStarted, UndeclaredEvent
from saga.journal import RunKey
from saga.runtime import Runtime


def start(runtime: Runtime, connection: Any, event: object, saga_id: UUID | None) -> UUID:
    """Open a saga and publish its first event with the caller's transaction.

    Two calls with the same id insert the same key: the second waits for the first one's
    transaction, then writes nothing, or is the first after all. Without an id there is no race: a
    new UUIDv7 is nobody else's.
    """
    event_type = runtime.registry.of(event)
    name = start_name(event_type)
    if name not in runtime.reactions:
        raise UndeclaredEvent(
            f"participant {runtime.participant} does not declare that {event_type} starts a saga: "
            f"write @{runtime.participant}.compensation({event_type.payload_class.__name__}) over "
            f"what undoes it, or {runtime.participant}.starts({event_type.payload_class.__name__}, "
            'nothing_to_undo="why")'
        )
    saga_id = saga_id or new_id()
    handled = context.current()
    envelope = runtime.envelope(event, saga_id, handled.envelope if handled else None)
    journal = runtime.open_journal(connection)
    key = RunKey(saga_id, name, envelope.id)
    if not journal.open(key, event_type.name, envelope.body):
        raise AlreadyStarted(saga_id)
    journal.append(envelope, event_type)
    runtime.set_deadlines(journal, runtime.reactions[name], event, envelope)
    return saga_id
