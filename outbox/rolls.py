"""Rolls: what makes a lost event show, on any bus, whatever lost it.

Some seconds after events of a type were handed to the broker, the relay sends their *roll*: their ids and positions. A
subscriber that was not given one of them within its patience asks the source for it, by itself (`outbox.roll_call`).

Why every loss shows. A reading of a lane ends with a cursor, and the cursor says exactly what was delivered by then
(`outbox.reader`). The relay stores the cursor of each roll in `outbox_roll`, numbered within the lane; roll *n* names
what is delivered by cursor *n* and was not by cursor *n - 1*. So whatever the cursors are, and whichever relay stored
them, each delivered event is in one of them: if it is in the newest and not in the first, then between two that follow
each other it came in. It does not matter how often, or in which order, the events themselves were sent.

A roll can be lost too. Each names the one before it of the same lane and type, and a lane that has become quiet repeats
now and then where it stands. A subscriber that has not taken the named one asks for it, and as a roll is a difference
of two stored cursors, the source makes it again, and any number of them as one. So nothing that is lost is lost without
a trace but everything at once and for ever.

Why none shows that is not there. A roll names only what was committed and confirmed by the broker; that it is still on
its way, being handled or waiting for a retry is what patience and the look at the subscriber's tables are for. An event
that is sent again though it was only slow is a duplicate, which the inbox drops.

Numbers in the events themselves were the other way: they must be made anew whenever a relay dies and its events are
sent again in another order, and they cost each delivery a look at what came before it. A roll costs 32 bytes per event,
and the receiver one statement for some hundred.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from struct import Struct
from typing import Annotated, Final, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from outbox.errors import MalformedMessage

MOST: Final = 500
"""Events that one request asks for, or one page of a roll made again names."""

ASK: Final = "outbox.ask"
"""Stands for the type of a message in which a subscriber asks for what it misses."""
_PREFIX: Final = b'{"specversion":"outbox.'
_RECORD: Final = Struct("!16sq")
RECORD_BYTES: Final = _RECORD.size

Lane = Annotated[int, Field(ge=0, le=15)]
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]


@dataclass(frozen=True, slots=True)
class Named:
    """One event in a roll, or asked for: its id, and where the source's log has it."""

    event_id: UUID
    lane: int
    position: int


class _Control(BaseModel):
    model_config = ConfigDict(frozen=True, strict=False, extra="ignore")


class Entry(_Control):
    """One lane of one roll. Where `previous` is `seq`, it only says where the lane stands."""

    lane: Lane
    seq: NonNegativeInt
    previous: NonNegativeInt
    """The roll before it of this lane that named events of the type; 0 where there is none."""
    previous_at: datetime
    count: NonNegativeInt = 0
    """How many of the records are this lane's; they stand in the order of the entries."""


class Page(_Control):
    """Rolls made again: all up to `to_seq` that were asked for, some events at a time."""

    lane: Lane
    to_seq: NonNegativeInt
    next: int | None = None
    """The position to ask from for more; None where this was all."""


def _is_records(text: str) -> str:
    if len(b64decode(text, validate=True)) % RECORD_BYTES:
        raise ValueError("not a whole number of records")
    return text


class Roll(_Control):
    """Events of one type that were handed to the broker."""

    specversion: Literal["outbox.roll/1"] = "outbox.roll/1"
    log: UUID
    type: Name
    ask: Name | None = None
    """The queue where whoever misses one may ask; None where no worker of the source is known."""
    entries: Annotated[tuple[Entry, ...], Field(max_length=16)] = ()
    page: Page | None = None
    records: Annotated[str, AfterValidator(_is_records)] = ""

    def named(self) -> Iterator[Named]:
        """The events, each with the lane that its place says."""
        lanes: Iterable[tuple[int, int | None]] = (
            [(entry.lane, entry.count) for entry in self.entries]
            if self.page is None
            else [(self.page.lane, None)]
        )
        records = _RECORD.iter_unpack(b64decode(self.records))
        for lane, count in lanes:
            for _, (id, position) in zip(
                range(2**31 if count is None else count), records, strict=False
            ):
                yield Named(UUID(bytes=id), lane, position)


class WantedRoll(_Control):
    """Rolls of one lane and type that a subscriber has not taken."""

    type: Name
    lane: Lane
    from_seq: NonNegativeInt
    """The last one that it has."""
    to_seq: NonNegativeInt
    since: datetime
    """When its subscription began: what was handed over before is not missed."""
    position: int = 0
    """It has named what is at or below this already."""


class WantedEvent(_Control):
    """One event that a subscriber misses."""

    id: UUID
    lane: Lane
    position: int


class Wanted(_Control):
    """What a subscriber asks of a source's log."""

    events: Annotated[tuple[WantedEvent, ...], Field(max_length=MOST)] = ()
    rolls: Annotated[tuple[WantedRoll, ...], Field(max_length=MOST)] = ()


class Ask(_Control):
    """A subscriber asks a source."""

    specversion: Literal["outbox.ask/1"] = "outbox.ask/1"
    log: UUID
    queue: Name
    """Where to send it."""
    wanted: Wanted


class Gone(_Control):
    """The source's answer about events that its log does not hold any more."""

    specversion: Literal["outbox.gone/1"] = "outbox.gone/1"
    log: UUID
    events: tuple[UUID, ...]


Control = Roll | Ask | Gone
_KINDS: Final[dict[bytes, type[Control]]] = {b"roll": Roll, b"ask": Ask, b"gone": Gone}


def is_control(body: bytes) -> bool:
    """Whether a message's body is no event but one of ours between relays and workers."""
    return body.startswith(_PREFIX)


def encode(message: Control) -> bytes:
    """Its bytes, which stand where an event's envelope does."""
    return message.model_dump_json(exclude_none=True).encode()


def decode(body: bytes) -> Control:
    """Read it. Raises `MalformedMessage`."""
    kind = body[len(_PREFIX) :].partition(b"/")[0]
    if kind not in _KINDS:
        raise MalformedMessage(
            f"a message between relays and workers of no known kind: {kind[:40]!r}"
        )
    try:
        return _KINDS[kind].model_validate_json(body)
    except ValidationError as error:
        raise MalformedMessage(f"a {kind.decode()} that cannot be read: {error}") from error


def records(named: Iterable[Named]) -> str:
    """Events as they stand in a roll."""
    return text_of(b"".join(_RECORD.pack(one.event_id.bytes, one.position) for one in named))


def text_of(packed: bytes) -> str:
    """Packed records (id, 16 bytes; position, 8 bytes) as they stand in a roll."""
    return b64encode(packed).decode()
