"""The clients that a worker's channel to Redis makes, and how it reads messages."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from kombu.utils import json as kombu_json
from kombu.utils.encoding import bytes_to_str

from outbox.celery import redis_taking
from outbox.celery.redis import reading_anything


class Channel:
    """As much of kombu's as makes clients."""

    sep = "\x06\x16"

    def __init__(self) -> None:
        self.pool, self.async_pool = object(), object()

    def _create_client(self, asynchronous: bool = False) -> Any:
        return SimpleNamespace(
            connection_pool=self.async_pool if asynchronous else self.pool,
            parse_response=lambda *_, **__: (b"queue\x06\x163", b"no message of kombu's"),
        )


def test_one_client_is_kept_for_all_acknowledgements_until_its_pool_is_another() -> None:
    channel: Any = reading_anything(Channel)()
    first = channel._create_client()
    assert channel._create_client() is first
    channel.pool = object()
    second = channel._create_client()
    assert second is not first
    assert second.connection_pool is channel.pool


def test_the_client_that_waits_is_another_one_and_reads_anything() -> None:
    channel: Any = reading_anything(Channel)()
    waiting = channel._create_client(asynchronous=True)
    assert waiting is not channel._create_client()
    _, item = waiting.parse_response(None, "BRPOP")
    assert b"application/octet-stream" in item.encode()


@pytest.mark.parametrize(
    "message",
    [
        {"body": "e30=", "headers": {"n": 1, "f": 0.5, "none": None, "deep": [{"a": True}]}},
        {"headers": {"big": 10**30, "text": "\u00fc \U0001f600", "half": "\ud800"}},
        {"headers": {"eta": datetime(2026, 11, 30, tzinfo=UTC), "id": UUID(int=7), "of": Decimal("1.5")}},
        {"headers": {"text": "__type__", "nested": {"at": date(2026, 11, 30)}}},
        {"headers": {"not a number": float("inf")}},
    ],
)  # fmt: skip
def test_a_message_is_read_as_kombu_reads_it(message: dict[str, Any]) -> None:
    item = kombu_json.dumps(message).encode()

    assert redis_taking._loaded(item) == kombu_json.loads(item)


@pytest.mark.parametrize("item", [b"", b"{", b"\xff", b'{"a": 1} x'])
def test_what_kombu_refuses_is_refused(item: bytes) -> None:
    with pytest.raises(ValueError) as theirs:  # noqa: PT011 - it is compared
        kombu_json.loads(bytes_to_str(item))
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        redis_taking._loaded(item)
    assert str(ours.value) == str(theirs.value)
