"""When a process rings: at once after a quiet moment, and seldom while it publishes on and on."""

from __future__ import annotations

import pytest

import outbox
from outbox import doorbell
from outbox.doorbell import Doorbell


class Clock:
    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(doorbell, "time", clock)
    monkeypatch.setattr(Doorbell, "_start", lambda _: None)
    return clock


def rings(bell: Doorbell, schema: str = "outbox") -> bool:
    bell._wanted.clear()
    bell.ring(schema)
    return schema in bell._wanted


def test_the_first_event_after_a_quiet_moment_rings_and_those_right_behind_it_do_not(
    clock: Clock,
) -> None:
    bell = Doorbell("postgresql://")
    assert rings(bell)
    assert not rings(bell)
    clock.now += 0.004
    assert not rings(bell)
    clock.now += 0.01
    assert rings(bell)


def test_while_events_keep_coming_it_rings_now_and_then(clock: Clock) -> None:
    bell = Doorbell("postgresql://")
    rung = 0
    for _ in range(1_000):
        clock.now += 0.001
        rung += rings(bell)
    assert 9 <= rung <= 11


def test_a_schema_does_not_ring_for_another(clock: Clock) -> None:
    bell = Doorbell("postgresql://")
    assert rings(bell)
    assert rings(bell, "other")


def test_a_bell_that_goes_while_it_rings_keeps_none_behind_it_from_ringing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, staying = (outbox.wake_relays(f"postgresql://{host}/db") for host in ("a", "b"))
    monkeypatch.setattr(going, "ring", lambda _: going.close())
    doorbell.announce("outbox")
    assert staying._wanted == {"outbox"}
    staying.close()


def test_channels_fit_where_names_are_long() -> None:
    assert doorbell.channel("billing") == "outbox_billing"
    assert len(doorbell.channel("b" * 63)) == 63
