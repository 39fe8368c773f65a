"""The clients that a worker's channel to Redis makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
