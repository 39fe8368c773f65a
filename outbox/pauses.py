"""How long a relay that found nothing waits before it looks again.

A quarter of the time for which there was nothing: so no event waits for more than a fraction of the time that went by
since the one before it, and looking costs little. Whoever rings (`outbox.doorbell`) ends a pause. As they ring before
their commit, the relay then looks often until it has found something, again in proportion to the time it has waited,
but twice as often: what is awaited then is a commit, and each look but asks whether anything has been committed.

Where everything that is found was rung for, looking is only a net, and may be cast seldom. One event that nobody rang
for shows that there are writers who do not ring, and for a while it is cast as often as without a bell.
"""

from __future__ import annotations

from typing import Final

_EAGER: Final = 0.00025
"""Least pause, in seconds, while it waits for the commit of whoever rang."""
_OF_A_COMMIT: Final = 1 / 8
_OF_QUIET: Final = 1 / 4
"""What part of the time for which there was nothing it pauses: while a commit is awaited, and otherwise."""
_ANNOUNCES: Final = 0.25
"""For how many seconds a ring or an event announces others: who publishes on and on rings more often than that."""
_SPARED: Final = 1.0
"""For how many seconds after something was found all else may wait, while a commit is awaited."""
_REMEMBERED: Final = 600.0
"""Seconds for which it is remembered that somebody did not ring."""


class Pauses:
    """Used by one thread. All times are in seconds, *now* is a monotonic clock's."""

    def __init__(self, shortest: float, longest: float, longest_if_rung: float, now: float) -> None:
        """*longest_if_rung*: the longest pause while all that is found was rung for, if it is longer."""
        self._shortest = shortest
        self._longest = longest
        self._longest_if_rung = max(longest, longest_if_rung)
        self._found_at = self._rung_at = now
        self._unannounced_at = float("-inf")

    @property
    def awaits_commit(self) -> bool:
        """Whether somebody has rung, and nothing was found since."""
        return self._rung_at > self._found_at

    def has_no_time(self, now: float) -> bool:
        """Whether nothing of the relay's own should be done now that another need not wait for: an event is awaited.

        It would be late by as long as that takes. And what is written could be all that is not on disk when the event
        can be seen, and only what is durable is sent.
        """
        return self.awaits_commit and now - self._found_at < _SPARED

    def quiet(self, now: float) -> float:
        """For how long nothing was found and nobody has rung."""
        return now - max(self._found_at, self._rung_at)

    def found(self, now: float) -> None:
        """There was something."""
        if self.quiet(now) > _ANNOUNCES:
            self._unannounced_at = now
        self._found_at = now

    def rung(self, now: float) -> None:
        """Somebody is about to commit."""
        self._rung_at = now

    def next(self, now: float) -> float:
        """How long to wait now, unless somebody rings."""
        all_ring = now - self._unannounced_at > _REMEMBERED
        longest = self._longest_if_rung if all_ring else self._longest
        shortest = min(_EAGER, self._shortest) if self.awaits_commit else self._shortest
        part = _OF_A_COMMIT if self.awaits_commit else _OF_QUIET
        return min(max(self.quiet(now) * part, shortest), longest)
