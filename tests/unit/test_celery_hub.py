"""The worker's event loop does not wait for its sockets while there is something to run."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from kombu.asynchronous import Hub

from outbox.celery.hub import stay_awake

Waits = list[float]


@pytest.fixture
def hub() -> Iterator[Any]:
    """A hub with a socket to wait for and a timer that is far off."""
    hub: Any = Hub()
    one, other = socket.socketpair()
    with one, other:
        hub.add_reader(one, lambda: None)
        hub.timer.call_after(60, lambda: None)
        yield hub
        hub.close()


@pytest.fixture
def waits(hub: Any) -> Waits:
    """How long each turn of the loop would wait for sockets; none of them does."""
    asked: Waits = []
    hub.poller.poll = asked.append
    stay_awake(hub)
    return asked


def test_what_a_callback_calls_soon_is_run_without_a_wait(hub: Any, waits: Waits) -> None:
    done: list[str] = []
    hub.call_soon(lambda: hub.call_soon(done.append, "acknowledged"))

    hub.run_once()
    hub.run_once()

    assert done == ["acknowledged"]
    assert waits[0] == 0
    assert waits[1] > 0


def test_what_a_timer_calls_soon_is_run_without_a_wait(hub: Any, waits: Waits) -> None:
    done: list[str] = []
    hub.timer.call_after(0, lambda: hub.call_soon(done.append, "acknowledged"))

    hub.run_once()
    hub.run_once()

    assert done == ["acknowledged"]
    assert waits[0] == 0
    assert waits[1] > 0


def test_a_loop_that_is_started_again_is_not_wrapped_twice(hub: Any, waits: Waits) -> None:
    wrapped = hub.poller.poll
    stay_awake(hub)
    assert hub.poller.poll is wrapped

    hub.run_once()
    assert len(waits) == 1
