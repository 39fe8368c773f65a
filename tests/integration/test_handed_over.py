"""What a relay remembers for its next roll is what its log says was delivered since the last one."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

import outbox
from outbox.handed_over import HandedOver, records_of
from outbox.reader import Cursor
from outbox.roll_caller import RollCaller
from outbox.rolls import RECORD_BYTES
from tests.integration.test_relay import Made, MemoryBus, registry, running


@pytest.mark.parametrize("seed", range(2))
def test_what_is_remembered_is_what_the_log_says_whatever_commits_late_or_is_refused(
    migrated_engine: Engine, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    compared: list[dict[tuple[int, str], bytes]] = []
    committed: list[int] = []
    call, chance = RollCaller._call, random.Random(seed)
    bus = MemoryBus()

    def checked(caller: Any, cursors: Sequence[Cursor], *rest: Any) -> Any:
        known = [lane for one in cursors for lane in one.his if caller._handed.knows(lane)]
        said = {}
        for cursor in cursors:
            for snapshot in {caller._called[lane].snapshot.text for lane in cursor.his}:
                alike = [
                    lane
                    for lane in cursor.his
                    if lane in known and caller._called[lane].snapshot.text == snapshot
                ]
                said |= caller._name(alike, cursor) if alike else {}
        remembered = copy_of(caller._handed).take(known)
        assert records(remembered) == records(said)
        compared.append(remembered)
        if chance.random() < 0.1:
            bus.refuses = 2
        return call(caller, cursors, *rest)

    monkeypatch.setattr(RollCaller, "_call", checked)
    writers = [
        threading.Thread(target=write, args=(migrated_engine, seed * 10 + n, committed))
        for n in range(1, 7)
    ]
    every = timedelta(milliseconds=20)
    with running(migrated_engine, bus, rolls=every, page_rows=16):
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        bus.await_numbers(set(committed), 60)
    assert sum(len(one) for one in compared) > 50


def write(engine: Engine, seed: int, committed: list[int]) -> None:
    chance, pause = random.Random(seed), threading.Event()
    for turn in range(60):
        numbers = range(seed * 10_000 + turn * 100)[-chance.choice([1, 1, 3, 40]) :]
        with Session(engine) as session:
            with session.begin_nested():  # so that they are written, and their positions drawn, now
                events = [Made(number, chance.randrange(100)) for number in numbers]
                outbox.publish_all(session, events, registry=registry)
            pause.wait(chance.random() * chance.choice([0.0, 0.005, 0.02]))
            if chance.random() < 0.8:
                session.commit()
                committed += numbers


def copy_of(handed: HandedOver) -> HandedOver:
    copied = HandedOver(handed._most)
    copied._begun = set(handed._begun)
    copied._records.update({key: list(its) for key, its in handed._records.items()})
    return copied


def records(by_key: Mapping[tuple[int, str], bytes | None]) -> dict[tuple[int, str], list[bytes]]:
    return {
        key: sorted(
            packed[at : at + RECORD_BYTES] for at in range(0, len(packed or b""), RECORD_BYTES)
        )
        for key, packed in by_key.items()
        if packed
    }


def test_more_than_can_be_remembered_is_left_to_the_log() -> None:
    handed = HandedOver(most=2)
    handed.begin([0])
    one = outbox.buses.OutgoingMessage("0" * 32, "a.b", None, b"", 0, 7)
    handed.add(records_of([one, one]))
    assert handed.knows(0)
    handed.add(records_of([one]))
    assert not handed.knows(0)
    assert handed.take([0]) == {}


def test_a_lane_that_is_not_known_from_its_last_roll_on_is_left_to_the_log() -> None:
    handed = HandedOver(most=10)
    handed.begin([0])
    both = [outbox.buses.OutgoingMessage("0" * 32, "a.b", None, b"", lane, 7) for lane in (0, 1)]
    handed.add(records_of(both))
    assert not handed.knows(1)
    assert handed.take([0, 1]) == {(0, "a.b"): bytes(16) + (7).to_bytes(8, "big")}
    assert not handed.knows(0)
