"""What comes off the wire, before anything of it is believed."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import compression

from outbox.buses.base import OutgoingMessage
from outbox.buses.message import celery_message
from outbox.celery.compression import MAX_BYTES, bound_decompression
from outbox.celery.raw import RawMessage
from outbox.celery.redis import readable
from outbox.celery.wire import WireBody, read_body
from outbox.errors import MalformedMessage
from outbox.limits import DEFAULT_LIMITS


def body_of(text: str, **attributes: Any) -> bytes:
    message = OutgoingMessage(str(uuid4()), "order.placed", None, text.encode(), 0, 0, **attributes)
    return celery_message(message).body


# ---- the body ----


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_an_envelope_arrives_as_the_bytes_it_was_sent_in(text: str) -> None:
    read = read_body(body_of(text), "application/json", DEFAULT_LIMITS)

    assert read == WireBody(text.encode())


def test_a_message_says_which_handler_it_is_for() -> None:
    read = read_body(body_of("{}", handler="b.bill", key_seq=7), None, DEFAULT_LIMITS)

    assert read == WireBody(b"{}", "b.bill", 7)


@given(st.binary() | st.recursive(st.none() | st.text(), st.lists).map(json.dumps).map(str.encode))
def test_anything_else_is_refused_as_malformed(raw: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read_body(raw, "application/json", DEFAULT_LIMITS)


@pytest.mark.parametrize("keywords", ['{"handler": 5}', '{"key_seq": "1"}', '{"key_seq": true}'])
def test_keywords_of_another_type_are_refused(keywords: str) -> None:
    with pytest.raises(MalformedMessage, match="of another type"):
        read_body(b'[["{}"], %s, {}]' % keywords.encode(), None, DEFAULT_LIMITS)


@pytest.mark.parametrize("content_type", ["application/x-python-serialize", "text/plain", ""])
def test_only_json_is_read(content_type: str) -> None:
    with pytest.raises(MalformedMessage, match="only JSON is read"):
        read_body(body_of("{}"), content_type, DEFAULT_LIMITS)


def test_a_body_far_over_the_limit_is_not_even_parsed() -> None:
    with pytest.raises(MalformedMessage, match="bytes"):
        read_body(b"[" * 7_000_000, None, DEFAULT_LIMITS)


# ---- the headers ----


def raw(headers: Any, **attributes: Any) -> RawMessage:
    values: dict[str, Any] = {
        "body": b"body",
        "headers": headers,
        "content_type": "application/json",
        "delivery_info": {"exchange": "events", "routing_key": "order.placed"},
        **attributes,
    }
    return RawMessage(SimpleNamespace(**values), "outbox.receive", "billing")  # type: ignore[arg-type]


def test_each_service_has_an_id_of_its_own_for_an_event_that_is_the_root() -> None:
    event_id = str(uuid4())

    headers = raw({"id": event_id, "shadow": "order.placed"}).headers

    assert headers["id"] == str(uuid5(UUID(event_id), "billing"))
    assert headers["root_id"] == event_id
    assert headers["shadow"] == "billing:order.placed"


def test_what_celery_would_act_upon_is_not_passed_on() -> None:
    acted_upon = [
        "eta",
        "expires",
        "timelimit",
        "group",
        "chord",
        "stamps",
        "replaced_task_nesting",
    ]

    headers = raw(dict.fromkeys(acted_upon, 1)).headers

    assert not headers.keys() & set(acted_upon)
    assert (headers["retries"], headers["ignore_result"]) == (0, True)


def test_the_trace_is_passed_on() -> None:
    headers = raw({"traceparent": "00-ab-cd-01", "sentry-trace": "x", "baggage": "a\nb"}).headers

    assert (headers["traceparent"], headers["sentry-trace"]) == ("00-ab-cd-01", "x")
    assert headers["baggage"] == ""


scalars = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
anything = st.recursive(
    scalars, lambda more: st.lists(more) | st.dictionaries(st.text(), more), max_leaves=5
)


@given(
    headers=anything
    | st.dictionaries(st.sampled_from(["id", "shadow", "task", "origin"]), anything),
    delivery_info=anything,
    content_type=anything,
    body=anything,
)
def test_no_message_is_too_odd_to_be_taken_in(
    headers: Any, delivery_info: Any, content_type: Any, body: Any
) -> None:
    message = raw(headers, delivery_info=delivery_info, content_type=content_type, body=body)

    (arguments,), _, _ = message.payload
    assert isinstance(arguments, bytes)
    assert str(UUID(message.headers["id"])) == message.headers["id"]
    assert message.headers["shadow"].isprintable()


@pytest.mark.parametrize("where", ["delivery_info", "headers"])
def test_a_redelivery_is_known_whichever_way_the_broker_says_it(where: str) -> None:
    given_in: dict[str, Any] = {"headers": {}, "delivery_info": {}, where: {"redelivered": True}}

    message = raw(given_in["headers"], delivery_info=given_in["delivery_info"])

    assert message.delivery_info["redelivered"] is True


# ---- Redis ----


def redis_item(**changes: Any) -> bytes:
    message = {
        "body": base64.b64encode(b"{}").decode(),
        "headers": {"task": "outbox.receive"},
        "properties": {
            "delivery_tag": "1",
            "delivery_info": {"exchange": "events", "routing_key": "order.placed"},
            "body_encoding": "base64",
        },
    }
    return json.dumps(message | changes).encode()


def test_a_message_in_a_redis_list_is_left_as_it_is() -> None:
    assert readable(redis_item(), "q") == redis_item()


@given(st.binary())
def test_what_is_no_message_becomes_the_body_of_one(item: bytes) -> None:
    message = json.loads(readable(item, "billing.events"))

    assert base64.b64decode(message["body"]) == item
    assert message["properties"]["delivery_info"]["routing_key"] == "billing.events"


@pytest.mark.parametrize(
    "changes",
    [
        {"body": None},
        {"body": "no base64!"},
        {"headers": None},
        {"headers": ["task"]},
        {"properties": {}},
        {"properties": {"delivery_tag": 1, "delivery_info": {}, "body_encoding": "base64"}},
        {"properties": {"delivery_tag": "1", "delivery_info": {"exchange": ""}}},
    ],
)
def test_a_message_that_kombu_would_stumble_over_is_wrapped(changes: dict[str, Any]) -> None:
    item = redis_item(**changes)

    assert base64.b64decode(json.loads(readable(item, "q"))["body"]) == item


# ---- compression ----


@pytest.fixture
def bounded() -> Iterator[None]:
    before = dict(compression._decoders)
    bound_decompression()
    yield
    compression._decoders.update(before)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("kind", ["gzip", "bzip2", "lzma"])
def test_a_bomb_is_not_unpacked(kind: str) -> None:
    packed, content_type = compression.compress(bytes(MAX_BYTES + 1), kind)

    with pytest.raises(ValueError, match="unpacks to more"):
        compression.decompress(packed, content_type)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("kind", ["gzip", "bzip2", "lzma"])
def test_what_is_not_too_large_is_unpacked(kind: str) -> None:
    packed, content_type = compression.compress(b"an event", kind)

    assert compression.decompress(packed, content_type) == b"an event"


@pytest.mark.usefixtures("bounded")
def test_what_is_cut_off_is_an_error() -> None:
    with pytest.raises(ValueError, match="cut off"):
        compression.decompress(zlib.compress(bytes(1_000))[:-5], "gzip")
