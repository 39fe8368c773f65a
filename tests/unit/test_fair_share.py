"""How many lanes each relay should hold, which each works out for itself."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from outbox.lanes import _fair_share
from outbox.publishing import LANES


@pytest.mark.parametrize("relays", range(1, 41))
def test_the_shares_of_all_relays_are_all_lanes_and_differ_by_one_at_most(relays: int) -> None:
    live = {uuid4() for _ in range(relays)}
    shares = [_fair_share(relay, live) for relay in live]
    assert sum(shares) == LANES
    assert max(shares) - min(shares) <= 1


def test_relays_beyond_the_number_of_lanes_hold_none() -> None:
    live = {UUID(int=number) for number in range(LANES + 3)}
    shares = [_fair_share(relay, live) for relay in sorted(live)]
    assert shares == [1] * LANES + [0] * 3
