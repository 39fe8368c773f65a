"""Our frames are py-amqp's, byte for byte."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from amqp.basic_message import Message
from amqp.method_framing import frame_writer
from hypothesis import given
from hypothesis import strategies as st

from outbox.buses.base import OutgoingMessage
from outbox.buses.confirms import Confirms
from outbox.buses.frames import FrameEncoder, message_properties
from outbox.buses.message import message_body
from outbox.errors import BusError


class _Transport:
    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += bytes(data)


class _Connection:
    bytes_sent = 0

    def __init__(self, frame_max: int) -> None:
        self.frame_max = frame_max


def as_py_amqp_writes(message: OutgoingMessage, exchange: str, key: str, frame_max: int) -> bytes:
    from amqp import spec
    from amqp.serialization import dumps

    transport: Any = _Transport()
    content = Message(
        message_body(message),
        channel=None,
        **message_properties(message.type, message.id),
    )
    # A message for one queue is mandatory: it must not vanish when that queue is not there.
    arguments = dumps("Bssbb", (0, exchange, key, not exchange, False))
    frame_writer(_Connection(frame_max), transport)(1, 1, spec.Basic.Publish, arguments, content)
    return transport.written


@given(
    text=st.text(max_size=300),
    event_type=st.from_regex(r"[a-z]{1,20}\.[a-z]{1,20}", fullmatch=True),
    exchange=st.from_regex(r"[a-z.]{0,20}", fullmatch=True),
    frame_max=st.sampled_from([4096, 131072]),
    repeat=st.sampled_from([1, 1, 1, 40]),
)
def test_frames_equal_those_of_py_amqp(
    text: str, event_type: str, exchange: str, frame_max: int, repeat: int
) -> None:
    body = json.dumps({"text": text * repeat}).encode()
    message = OutgoingMessage(
        id=str(uuid4()), type=event_type, key=None, body=body, lane=0, position=1
    )
    encoder = FrameEncoder(1, frame_max)
    for _ in range(2):
        assert encoder.encode(message, exchange, event_type) == as_py_amqp_writes(
            message, exchange, event_type, frame_max
        )


@given(body=st.text().map(lambda text: json.dumps(text, ensure_ascii=False)) | st.text())
def test_the_body_is_json_that_holds_the_envelope_unchanged(body: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in body):
        return
    message = OutgoingMessage(
        id=str(uuid4()), type="a.b", key=None, body=body.encode(), lane=0, position=1
    )
    assert json.loads(message_body(message)) == [[body], {}, {}]


@given(order=st.permutations(range(1, 20)))
def test_confirms_in_any_order_count_only_for_their_own_tags(order: list[int]) -> None:
    confirms = Confirms()
    confirms.give(len(order))
    seen: set[int] = set()
    for tag in order:
        confirms.acked(tag, False)
        seen.add(tag)
        assert confirms.taken == next(tag for tag in range(20) if tag + 1 not in seen)


def test_a_confirm_for_many_counts_for_all_before_it() -> None:
    confirms = Confirms()
    confirms.give(9)
    confirms.acked(9, False)
    confirms.acked(5, True)
    assert confirms.taken == 5
    confirms.acked(8, True)
    assert confirms.taken == 9


def test_a_late_ack_of_one_message_is_no_ack_of_the_next() -> None:
    confirms = Confirms()
    confirms.give(1)
    confirms.give(1)
    confirms.acked(1, False)
    assert confirms.has_taken(1)
    assert not confirms.has_taken(2)


def test_after_a_refusal_no_ack_counts_for_the_refused() -> None:
    confirms = Confirms()
    confirms.give(3)
    confirms.acked(1, False)
    confirms.nacked(2, False)
    confirms.acked(3, True)
    assert confirms.has_taken(1)
    with pytest.raises(BusError, match="refused message 2"):
        confirms.has_taken(3)


def test_an_ack_of_what_was_never_sent_is_a_failure_and_not_believed() -> None:
    confirms = Confirms()
    confirms.give(1)
    confirms.acked(2, True)
    with pytest.raises(BusError, match="confirmed message 2, and 1 were sent"):
        confirms.has_taken(1)
