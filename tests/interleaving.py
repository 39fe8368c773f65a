"""Playing one saga to its end through choices: which message comes next, again, or at the same time
as another; what fails; what the inbox has forgotten. A saga must be whole whatever was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from outbox import dead_letters, pending
from outbox.dead_letters import Matching
from outbox.pending import Owed
from saga.testing.choreography import Message
from tests.overlapping import overlap
from tests.sagas import BRANCHES, Shop, check_whole

Pick = Callable[[int], int]
"""A number below the one given."""

_FAILING = (
    *(f"{name}.do" for name in BRANCHES),
    "prepare.do", "order.confirm", "inventory.undo", "order.undo", "prepare.undo",
)  # fmt: skip
_STOPS = ("arrivals", "arrivals", "find", "lock", "record", "runs")
"""After a look at what others have written, and after the first and the last call."""
_MOST_TURNS = 200


@dataclass
class Budget:
    """How often something unusual may still happen, so that every play ends."""

    duplicates: int = 4
    lapses: int = 2
    overlaps: int = 6


def play(shop: Shop, pick: Pick, budget: Budget | None = None) -> str:
    """Play a new saga until nothing is left to do; how it ended. Raises what `check_whole` raises.

    One of the participants may be down until all others have nothing left to do.
    """
    budget = budget or Budget()
    _forget_earlier_plays(shop)
    for what in _FAILING:
        # Two failures use up the attempts, so a third comes after a redrive.
        shop.failures[what] = max(0, pick(12) - 8)
    down = ("", "order", "order", *BRANCHES)[pick(6)]
    saga_id = shop.start(*(name for name in BRANCHES if pick(6) == 5))
    for _ in range(_MOST_TURNS):
        waiting = shop.play.collect()
        if waiting or _redrive(shop):
            # In an order that is the same when the play is repeated, whoever of two commits first.
            waiting = sorted(waiting, key=str)
            _next(shop, [one for one in waiting if one.service != down] or waiting, pick, budget)
        else:
            return check_whole(shop, saga_id)
    raise AssertionError(f"not at its end after {_MOST_TURNS} turns: {shop.states(saga_id)}")


def _forget_earlier_plays(shop: Shop) -> None:
    """One that was broken off has left work behind."""
    shop.run("DELETE FROM outbox.pending_delivery")
    shop.run("DELETE FROM outbox.dead_letter")
    shop.reset()
    shop.failures.clear()


def _next(shop: Shop, waiting: Sequence[Message], pick: Pick, budget: Budget) -> None:
    what = pick(8)
    if what == 7 and budget.duplicates and shop.play.delivered:
        budget.duplicates -= 1
        _again(shop, shop.play.delivered[pick(len(shop.play.delivered))])
    elif what == 6 and budget.lapses:
        budget.lapses -= 1
        shop.run("DELETE FROM outbox.inbox")
    elif what in (3, 4, 5) and budget.overlaps and (pairs := _pairs(waiting)):
        budget.overlaps -= 1
        first, second = pairs[pick(len(pairs))]
        overlap(
            shop.engine,
            lambda: shop.play.deliver(first),
            lambda: shop.play.deliver(second),
            after=_STOPS[pick(len(_STOPS))],
            time=1 + pick(2),
        )
    elif waiting:
        shop.play.deliver(waiting[pick(len(waiting))])


def _pairs(waiting: Sequence[Message]) -> list[tuple[Message, Message]]:
    """Messages that can come at the same time to one participant."""
    return [
        (first, second)
        for first in waiting
        for second in waiting
        if first.service == second.service and first != second
    ]


def _again(shop: Shop, message: Message) -> None:
    """Deliver it once more; work that has been done, as if it were owed again."""
    if message.handler is not None:
        owed = Owed(message.service, message.handler, message.event_id, message.type, message.body)
        with Session(shop.engine) as session, session.begin():
            pending.owe(session, owed, "redrive")
    shop.play.deliver(message)


def _redrive(shop: Shop) -> int:
    """What a person does in the end: everything that was given up is tried again."""
    with Session(shop.engine) as session, session.begin():
        return dead_letters.redrive(session, Matching())
