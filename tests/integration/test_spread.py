"""How the lanes lie over any number of relays: evenly, soon after one has come, left or died."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

import outbox
from outbox.relay import Relay
from tests.integration.test_relay import Made, MemoryBus, numbers, registry, spawn, until
from tests.relaying import running

LANES = 16


@pytest.fixture
def _beats_are_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the relays in this process: each step takes a beat of those who give and one of those who take."""
    monkeypatch.setattr("outbox.lease_keeper.BEAT_EVERY", timedelta(milliseconds=200))


def shares(engine: Engine) -> list[int]:
    """How many lanes each relay has that has any, the smallest first."""
    with engine.connect() as connection:
        found = connection.scalars(
            text(
                "SELECT count(*) FROM (SELECT DISTINCT ON (lane) lane, relay_id FROM outbox.outbox_lease "
                "ORDER BY lane, epoch DESC) AS newest WHERE relay_id IS NOT NULL GROUP BY relay_id"
            )
        )
        return sorted(found)


def even(relays: int) -> list[int]:
    """What `shares` says of an even spread."""
    return sorted(len(range(relay, LANES, relays)) for relay in range(min(relays, LANES)))


def publish(engine: Engine, *numbers: int) -> None:
    """Each with a key of its own, so that there are some in every lane."""
    with Session(engine) as session, session.begin():
        events = [Made(number, number) for number in numbers]
        outbox.publish_all(session, events, registry=registry)


@pytest.mark.usefixtures("_beats_are_frequent")
def test_the_spread_is_even_whenever_a_relay_has_come_left_or_been_killed(
    migrated_engine: Engine, tmp_path: Path
) -> None:
    bus, path = MemoryBus(), tmp_path / "sent"

    def await_spread_over(relays: int) -> None:
        until(lambda: shares(migrated_engine) == even(relays))

    with ExitStack() as staying, ExitStack() as leaving:
        for relays in range(1, 5):
            joined = leaving if relays == 2 else staying
            joined.enter_context(running(migrated_engine, bus))
            await_spread_over(relays)
        killed = spawn(migrated_engine, path)
        staying.callback(killed.wait)
        staying.callback(killed.kill)
        await_spread_over(5)
        publish(migrated_engine, *range(160))
        until(lambda: {*bus.taken, *numbers(path)} == set(range(160)))
        assert sorted([*bus.taken, *numbers(path)]) == list(range(160))
        leaving.close()
        publish(migrated_engine, *range(160, 320))
        await_spread_over(4)
        killed.kill()
        publish(migrated_engine, *range(320, 480))
        await_spread_over(3)
        until(lambda: {*bus.taken, *numbers(path)} == set(range(480)))


@pytest.mark.usefixtures("_beats_are_frequent")
def test_of_more_relays_than_lanes_some_hold_none_disturb_nobody_and_step_in(
    migrated_engine: Engine,
) -> None:
    buses = [MemoryBus() for _ in range(LANES + 2)]
    with ExitStack() as staying:
        stays = [ExitStack() for _ in buses]
        relays: list[Relay] = []
        for stay, bus in zip(stays, buses, strict=True):
            staying.enter_context(stay)
            relays.append(stay.enter_context(running(migrated_engine, bus, listen=False)))

        def idle() -> list[int]:
            return [number for number, relay in enumerate(relays) if not relay._held()]

        until(lambda: shares(migrated_engine) == even(len(relays)) and len(idle()) == 2)
        publish(migrated_engine, *range(320))
        until(lambda: sum(len(bus.taken) for bus in buses) >= 320)
        assert sorted(number for bus in buses for number in bus.taken) == list(range(320))
        waiting = idle()
        assert [len(buses[number].taken) for number in waiting] == [0, 0]
        assert sum(relay.stats.failures for relay in relays) == 0

        for number in sorted(set(range(len(relays))) - set(waiting))[:2]:
            stays[number].close()
        until(lambda: all(len(relays[number]._held()) == 1 for number in waiting))
        publish(migrated_engine, *range(320, 640))
        until(lambda: {each for bus in buses for each in bus.taken} == set(range(640)))
        assert all(buses[number].taken for number in waiting)
