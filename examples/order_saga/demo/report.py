"""The report of a run: what a newcomer wants to know, in the order in which the questions come up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from examples.order_saga.demo.audit import Finding
from examples.order_saga.demo.books import Order
from examples.order_saga.demo.summary import Summary, percentile
from examples.order_saga.demo.timeline import (
    Moment,
    order_of_the_outage,
    timeline,
    unfulfilled_order,
)

SHOWN_VIOLATIONS = 5
SIGNS = {
    "+": ("✓", "green"),
    "-": ("↶", "yellow"),
    "!": ("✗", "red"),
    "=": ("■", "bold"),
    ".": ("·", "dim"),
}


def print_report(console: Console, summary: Summary) -> None:
    _heading(console, "Orders")
    _pairs(console, _orders(summary))
    _heading(console, f"The outage of {summary.outage.service}")
    _pairs(console, _outage(summary))
    _heading(console, f"{summary.latecomer.service.capitalize()}, added while the others ran")
    _pairs(console, _latecomer(summary))
    _heading(console, "Events")
    _pairs(console, _events(summary))
    for title, order in _told_orders(summary):
        _heading(console, f"{title}: order {str(order.id)[:8]}")
        console.print(_timeline_table(timeline(summary.told.books, order)))
    _heading(console, "Audit of all five databases")
    console.print(_audit_table(summary.findings))
    _print_violations(console, summary.findings)
    console.print()


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{text}[/]", align="left", style="dim"))


def _pairs(console: Console, pairs: Iterator[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 3))
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column()
    for figure, meaning in pairs:
        table.add_row(figure, meaning)
    console.print(Padding(table, (0, 0, 0, 2)))


def _orders(summary: Summary) -> Iterator[tuple[str, str]]:
    orders = summary.orders
    yield (
        str(orders["placed"]),
        (
            f"placed over HTTP, answered in {percentile(summary.accept_ms, 50):.0f} ms "
            f"(half of them) to {percentile(summary.accept_ms, 99):.0f} ms (99 of 100)"
        ),
    )
    usual = summary.settle_ms_apart_from_outage
    yield str(orders["confirmed"]), "confirmed: stock taken, points added, parcel on its way"
    said_no = ", ".join(f"{name} to {count}" for name, count in summary.rejections.items())
    yield str(orders["cancelled"]), f"cancelled: no was said by {said_no}"
    yield str(summary.undone), "steps of other services were undone for that"
    if usual:
        yield (
            f"{_seconds(percentile(usual, 50))}",
            (
                f"from accepted to decided (half of them; 99 of 100 in "
                f"{_seconds(percentile(usual, 99))}), the outage aside"
            ),
        )
    for what in ("pending", "stuck"):
        if orders[what]:
            yield f"[red]{orders[what]}[/]", what


def _outage(summary: Summary) -> Iterator[tuple[str, str]]:
    outage = summary.outage
    yield (
        f"{outage.lasted_seconds:.1f} s",
        (
            f"dead: worker and relay killed with SIGKILL, {outage.handled_meanwhile} events handled "
            "in that time"
        ),
    )
    yield str(outage.accepted_meanwhile), "orders accepted meanwhile"
    if outage.caught_up:
        yield (
            f"{outage.caught_up_seconds:.1f} s",
            ("from its start until it had caught up; each of these orders has ended"),
        )
    else:
        yield "[red]no[/]", "it has not caught up"


def _latecomer(summary: Summary) -> Iterator[tuple[str, str]]:
    counters = dict(summary.latecomer.counters)
    yield (
        str(summary.latecomer.orders_seen),
        ("new orders counted since it subscribed; nothing else was changed or restarted for it"),
    )
    for name in ("orders confirmed", "orders cancelled"):
        yield str(counters.get(name, 0)), f"{name} counted, older ones among them"


def _events(summary: Summary) -> Iterator[tuple[str, str]]:
    traffic = summary.told.traffic
    yield (
        str(traffic.published),
        f"published, which makes {traffic.expected} deliveries to handlers",
    )
    yield str(len(traffic.lost)), "of these deliveries lost"
    yield str(len(traffic.phantom)), "received that nobody had published"
    yield str(traffic.redelivered), "messages came more than once, as some do after a kill"
    yield str(traffic.absorbed), "deliveries absorbed by an inbox, which had had them before"
    if summary.told.replayed:
        yield (
            str(summary.told.replayed),
            ("had died inside Redis with the worker, and were sent again from the outbox"),
        )


def _told_orders(summary: Summary) -> Iterator[tuple[str, Order]]:
    told = summary.told
    waited = order_of_the_outage(told.books, told.killed_at, told.restarted_at)
    if waited is not None:
        yield "An order that waited for the dead service", waited
    unfulfilled = unfulfilled_order(told.books, told.killed_at)
    if unfulfilled is not None:
        yield "An order that could not be fulfilled", unfulfilled


def _timeline_table(moments: Sequence[Moment]) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    for moment in moments:
        sign, style = SIGNS[moment.sign]
        after = (moment.at - moments[0].at).total_seconds() * 1000
        table.add_row(
            f"+{_seconds(after)}", moment.service, Text(sign, style=style), Text(moment.what, style)
        )
    return Padding(table, (0, 0, 0, 2))


def _audit_table(findings: Sequence[Finding]) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column(style="dim")
    for finding in findings:
        sign = "[green]✓[/]" if finding.holds else "[bold red]✗[/]"
        table.add_row(sign, finding.promise, finding.counted)
    return Padding(table, (0, 0, 0, 2))


def _print_violations(console: Console, findings: Sequence[Finding]) -> None:
    for finding in findings:
        for violation in finding.violations[:SHOWN_VIOLATIONS]:
            console.print(Text(f"  violation: {violation}", style="red"))
        more = len(finding.violations) - SHOWN_VIOLATIONS
        if more > 0:
            console.print(Text(f"  and {more} more like this", style="red"))


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"
