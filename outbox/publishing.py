"""`publish`: write an event to the log inside the caller's transaction. It never commits.

With a SQLAlchemy `Session` the events are held until just before the commit and written there in one statement, after
the session's own flush: so the rows that an event speaks of are locked before its position is drawn, which is what
order per key rests on. Inside a savepoint, and on connections, they are written at once, and what is held before
the savepoint begins.

Why nothing held is lost, and nothing rolled back is written: events are held per root transaction of a session, and
only while no savepoint is open, so no rollback but that of the root can concern them; `before_commit` of that very root
writes them, and with the root they vanish.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary
from zlib import crc32

import psycopg
from sqlalchemy import Connection
from sqlalchemy import event as sqlalchemy_events
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from outbox.connections import USE_ASYNC, Executor, executor, kind_of
from outbox.context import current
from outbox.counting import Counted, draw
from outbox.direct import BINARY, TEXT, Statement, direct_statement, send_directly
from outbox.doorbell import RINGING, announce
from outbox.envelope import Envelope
from outbox.errors import ConfigurationError, NotInTransaction
from outbox.events import EventType, Registry
from outbox.events import registry as default_registry
from outbox.limits import DEFAULT_LIMITS, Limits
from outbox.sql import DEFAULT_SCHEMA, in_schema
from outbox.writing import Written, write

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

LANES = 16

_COLUMNS = "(lane, event_id, type, version, key, key_seq, body)"
_INSERT_ONE = f"INSERT INTO {{schema}}.outbox_event {_COLUMNS} VALUES (%s, %s, %s, %s, %s, %s, %s)"  # noqa: S608
_INSERT_MANY = f"""
INSERT INTO {{schema}}.outbox_event {_COLUMNS}
SELECT * FROM unnest(%b::smallint[], %b::uuid[], %b::text[], %b::integer[], %b::text[], %b::bigint[], %b::bytea[])
"""  # noqa: S608

_LANE_TEXTS = tuple(b"%d" % lane for lane in range(LANES))
_FORMATS = (TEXT, BINARY, TEXT, TEXT, TEXT, TEXT, BINARY)


@dataclass(slots=True)
class _Held:
    core: Connection
    execute: Executor
    events: list[tuple[str, Written]]
    """Each with the schema that it is for."""
    is_written: bool = False
    times_written: int = 0
    """How often what was held has been written, before savepoints and the commit."""


class Held(NamedTuple):
    """What a session's transaction holds at one moment."""

    events: int
    times_written: int


_held: WeakKeyDictionary[SessionTransaction, _Held] = WeakKeyDictionary()


def publish(
    connection: Any,
    event: object,
    *,
    source: str | None = None,
    caused_by: Envelope | None = None,
    correlation_id: str | None = None,
    extensions: Mapping[str, str | int] | None = None,
    registry: Registry = default_registry,
    schema: str = DEFAULT_SCHEMA,
    limits: Limits = DEFAULT_LIMITS,
) -> UUID:
    """Publish *event* exactly if the transaction open on *connection* commits; returns the event's id.

    *connection*: a SQLAlchemy `Session` or `Connection`, a psycopg connection or cursor, or Django's connection.
    *source* is by default the service whose handler runs, else the first part of the event type. Inside a handler,
    cause and correlation are those of the event being handled.

    Raises, before anything is written: `UnregisteredEvent`, `InvalidPayload`, `PayloadTooLarge`, `NotInTransaction`.
    """
    # `of` would do, at a call more (see `_wrote_directly`).
    event_type = registry.by_class.get(type(event)) or registry.of(event)
    written = write(
        event_type, event, source, caused_by, correlation_id, extensions, limits, current()
    )
    if RINGING:
        announce(schema)
    if not _wrote_directly(connection, written, schema):
        _append_all(connection, (written,), schema)
    return written.id


def publish_all(
    connection: Any,
    events: Iterable[object],
    *,
    source: str | None = None,
    caused_by: Envelope | None = None,
    correlation_id: str | None = None,
    extensions: Mapping[str, str | int] | None = None,
    registry: Registry = default_registry,
    schema: str = DEFAULT_SCHEMA,
    limits: Limits = DEFAULT_LIMITS,
) -> list[UUID]:
    """Publish *events* in their order, in one statement. As `publish`; where one is refused, none is written."""
    options = source, caused_by, correlation_id, extensions, limits, current()
    written = [write(registry.of(event), event, *options) for event in events]
    announce(schema)
    _append_all(connection, written, schema)
    return [event.id for event in written]


async def apublish(
    connection: AsyncSession | AsyncConnection,
    event: object,
    **options: Any,
) -> UUID:
    """As `publish`, for SQLAlchemy's `AsyncSession` and `AsyncConnection`.

    Raises `ConfigurationError` for what is neither, such as psycopg's own `AsyncConnection`.
    """
    (event_id,) = await apublish_all(connection, [event], **options)
    return event_id


async def apublish_all(
    connection: AsyncSession | AsyncConnection,
    events: Iterable[object],
    **options: Any,
) -> list[UUID]:
    """As `publish_all`, for what `apublish` takes."""
    if hasattr(connection, "run_sync"):
        result: list[UUID] = await connection.run_sync(publish_all, list(events), **options)
        return result
    raise ConfigurationError(f"cannot publish through a {kind_of(connection)}: {USE_ASYNC}")


def append(
    connection: Any, envelope: Envelope, event_type: EventType, *, schema: str = DEFAULT_SCHEMA
) -> None:
    """Write an envelope that was made before (`encode`), as `publish` writes its own."""
    written = Written(event_type, envelope.id, envelope.source, envelope.key, envelope.body)
    announce(schema)
    _append_all(connection, [written], schema)


def _append_all(connection: Any, events: Sequence[Written], schema: str) -> None:
    if isinstance(connection, scoped_session):
        connection = connection()
    if not isinstance(connection, Session):
        _write(executor(connection), events, schema)
        return
    if connection.in_nested_transaction():
        execute = executor(connection)
        connection.flush()
        _write(execute, events, schema)
        return
    root = connection.get_transaction()
    held = None if root is None else _held.get(root)
    if held is None:
        core = connection.connection()
        execute = executor(core)  # refuses autocommit now, and begins the transaction
        root = connection.get_transaction()
        if root is None:
            raise NotInTransaction("the session has no transaction; begin one before publishing")
        held = _held[root] = _Held(core, execute, [])
        _listen()
    # Another listener publishes, behind ours; or there is a savepoint that the session does not know of.
    if held.is_written or held.core.in_nested_transaction():
        connection.flush()
        _write(held.execute, events, schema)
        return
    held.events.extend((schema, event) for event in events)


def held_by(session: Session) -> Held:
    """What is held now, to be compared later."""
    held = _held_of(session)
    return Held(0, 0) if held is None else Held(len(held.events), held.times_written)


def withdraw(session: Session, before: Held) -> bool:
    """Hold no more than *before*; False where what was held then has been written since."""
    held = _held_of(session)
    if held is not None:
        if before.events and held.times_written != before.times_written:
            return False
        del held.events[before.events :]
    return True


def _held_of(session: Session) -> _Held | None:
    root = session.get_transaction()
    return None if root is None else _held.get(root)


def _write_held(session: Session) -> None:
    root = session.get_transaction()
    # Fired for savepoints too: what the root holds is not theirs.
    if root is None or session.in_nested_transaction() or root not in _held:
        return
    session.flush()
    held = _held[root]
    held.is_written = True
    _write_out(held)


def _write_ahead_of_savepoint(session: Session, begun: SessionTransaction) -> None:
    """What was published before a savepoint comes before what is published in it, and outlives it.

    SQLAlchemy has flushed by now, and sends SAVEPOINT only with the next statement of its own.
    """
    root = session.get_transaction() if begun.nested else None
    if root is not None and root in _held:
        _write_out(_held[root])


def _write_out(held: _Held) -> None:
    for schema in dict.fromkeys(schema for schema, _ in held.events):
        events = [event for its_schema, event in held.events if its_schema == schema]
        announce(schema)
        _write(held.execute, events, schema)
    held.events.clear()
    held.times_written += 1


@cache
def _listen() -> None:
    if not sqlalchemy_events.contains(Session, "before_commit", _write_held):
        sqlalchemy_events.listen(Session, "before_commit", _write_held)
        sqlalchemy_events.listen(Session, "after_transaction_create", _write_ahead_of_savepoint)


def _write(execute: Executor, events: Sequence[Written], schema: str) -> None:
    if len(events) == 1 and _wrote_directly(execute.driver, events[0], schema):
        return
    sequences = _count(execute, events, schema)
    rows = [_row(event, seq) for event, seq in zip(events, sequences, strict=True)]
    if len(rows) == 1:
        execute(in_schema(_INSERT_ONE, schema), rows[0], False)
    elif rows:
        columns = [list(column) for column in zip(*rows, strict=True)]
        execute(in_schema(_INSERT_MANY, schema), columns, False)


def _wrote_directly(connection: object, event: Written, schema: str) -> bool:
    """Write an event at the least cost: that is of no ordered type, through psycopg. False, with nothing done, if not.

    The one way that is kept to few calls. Between two round trips of a transaction other code has had the processor's
    caches: each function costs 3 us there before it does anything (docs/design.md).
    """
    event_type, event_id, _, key, body = event
    if event_type.ordered or not isinstance(connection, psycopg.Connection):
        return False
    id_bytes, key_bytes = event_id.int.to_bytes(16, "big"), None if key is None else key.encode()
    lane = crc32(id_bytes if key_bytes is None else key_bytes) & (LANES - 1)  # as `lane_of`
    values = (
        _LANE_TEXTS[lane], id_bytes, event_type.name.encode(), b"%d" % event_type.version,
        key_bytes, None, body,
    )  # fmt: skip
    return send_directly(connection, _insert_one(schema), values, _FORMATS)


@cache
def _insert_one(schema: str) -> Statement:
    return direct_statement(in_schema(_INSERT_ONE, schema))


def _row(event: Written, key_seq: int | None) -> tuple[object, ...]:
    event_type, event_id, _, key, body = event
    lane = lane_of(event_id.bytes, None if key is None else key.encode())
    return lane, event_id, event_type.name, event_type.version, key, key_seq, body


def lane_of(event_id: bytes, key: bytes | None) -> int:
    """The lane of an event: the same for the same key, for ever; events without one spread out."""
    return crc32(event_id if key is None else key) & (LANES - 1)


def _count(execute: Executor, events: Sequence[Written], schema: str) -> list[int | None]:
    """The numbers of ordered events within their keys, drawn key by key in sorted order, lest two writers deadlock."""
    places = [
        Counted(event.source, event.event_type.name, event.key)
        if event.event_type.ordered and event.key is not None
        else None
        for event in events
    ]
    counts = Counter(place for place in places if place is not None)
    following: dict[Counted, int] = {}
    for counted, count in sorted(counts.items()):
        following[counted] = draw(execute, counted, count, schema) - count
    sequences: list[int | None] = []
    for place in places:
        if place is None:
            sequences.append(None)
            continue
        following[place] += 1
        sequences.append(following[place])
    return sequences
