"""How often a relay looks, by what it has found and who has rung."""

from __future__ import annotations

from outbox.pauses import Pauses


def pauses(now: float = 0.0) -> Pauses:
    return Pauses(shortest=0.002, longest=0.25, longest_if_rung=1.0, now=now)


def test_a_pause_is_a_quarter_of_the_time_for_which_there_was_nothing() -> None:
    ours = pauses()
    ours.found(0.05)
    assert ours.next(0.051) == 0.002
    assert ours.next(0.09) == (0.09 - 0.05) / 4


def test_while_everything_is_rung_for_the_longest_pause_is_longer() -> None:
    ours = pauses()
    assert ours.next(100) == 1.0
    ours.rung(100)
    ours.found(100.01)
    assert ours.next(200) == 1.0


def test_an_event_that_nobody_rang_for_shortens_the_longest_pause_for_a_while() -> None:
    ours = pauses()
    ours.found(100)
    assert ours.next(200) == 0.25
    assert ours.next(700.1) == 1.0


def test_once_somebody_has_rung_it_looks_often_until_it_has_found_something() -> None:
    ours = pauses()
    ours.found(100)
    ours.rung(101)
    assert ours.awaits_commit
    assert ours.next(101) < 0.001
    assert ours.next(101.4) == (101.4 - 101) / 8
    ours.found(101.5)
    assert not ours.awaits_commit
    assert ours.next(101.5) == 0.002


def test_what_is_confirmed_is_stored_soon_though_others_ring_on_and_on() -> None:
    ours = pauses()
    ours.found(100)
    assert not ours.has_no_time(100.1)
    ours.rung(100.2)
    assert ours.has_no_time(100.3)
    ours.rung(101.1)
    assert not ours.has_no_time(101.2)
