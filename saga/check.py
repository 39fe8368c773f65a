"""`saga check`: the faults that a choreography has before it runs, each with its place in the source.

The rules are those of saga theory (Garcia-Molina & Salem 1987; Richardson's pivot) and of swarm
protocols (Kuhn, Melgratti, Tuosto 2023), asked of the graph of `saga.flow`. Three of theirs need no
check here, because the runtime cannot be told otherwise: who must compensate hears of every abort
(it is broadcast), a compensation has none of its own, and it runs once per step that was done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from saga.contract import Contract
from saga.findings import Finding, Severity, has_errors, in_order
from saga.flow import Flow
from saga.rules import deciding, events, undoing, ways

Rule = Callable[[Flow], Iterator[Finding]]

RULES: Final[tuple[Rule, ...]] = (*events.RULES, *ways.RULES, *deciding.RULES, *undoing.RULES)


def check(contracts: Sequence[Contract]) -> list[Finding]:
    """Every fault of the choreography that the contracts make together, errors first."""
    flow = Flow(contracts)
    return in_order(finding for rule in RULES for finding in rule(flow))


__all__ = ["RULES", "Finding", "Severity", "check", "has_errors"]
