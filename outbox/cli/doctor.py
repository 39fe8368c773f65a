"""`outbox doctor`: the checks of `outbox.doctor`, one line each, with the fix."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import click

from outbox import doctor
from outbox.cli import options
from outbox.cli.output import Problem, console, masked, print_json, printable, reporting_problems
from outbox.doctor import Finding, Level
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery

_COLOURS: Final = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


@click.command("doctor", short_help="Check everything that could quietly break a promise.")
@options.database_url(required=False)
@options.broker_url(required=False)
@options.schema
@options.exchange
@click.option("--queue", "queues", multiple=True, help="A queue that must be there; repeatable.")
@click.option("-A", "--app", "app_name", metavar="MODULE", help="A Celery app to look at as well.")
@click.option("--strict", is_flag=True, help="Exit 1 for warnings too.")
@options.as_json
@reporting_problems
def command(
    database_url: str | None,
    broker_url: str | None,
    schema: str,
    exchange: str,
    queues: tuple[str, ...],
    app_name: str | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Look at database, broker and Celery app, whichever are named, and change nothing.

    Exits 1 when a check fails.
    """
    app = None if app_name is None else _load(app_name)
    examinations: list[Iterator[Finding]] = []
    if database_url is not None:
        examinations.append(_database(database_url, schema))
    if broker_url is not None:
        named = {**dict.fromkeys(queues), **_queues_of(app)}
        examinations.append(doctor.examine_broker(broker_url, exchange=exchange, queues=named))
    if app is not None:
        examinations.append(doctor.examine_app(app))
    if not examinations:
        raise click.UsageError("name what to look at: --database-url, --broker-url or --app")
    findings = []
    for finding in map(_masked, chain.from_iterable(examinations)):
        findings.append(finding)
        if not as_json:
            _print(finding)
    level = doctor.worst(findings)
    if as_json:
        print_json({"verdict": level.name, "findings": [_as_dict(each) for each in findings]})
    else:
        _print_verdict(findings)
    if level is Level.FAIL or (strict and level is Level.WARN):
        sys.exit(1)


def _database(url: str, schema: str) -> Iterator[Finding]:
    from outbox.schema.installed import installed_components

    with options.database(url, "doctor") as engine:
        yield from doctor.examine_database(engine, installed_components(), schema)


def _load(name: str) -> Celery:
    from celery.app.utils import find_app

    sys.path.insert(0, os.getcwd())
    try:
        app: Celery = find_app(name)
    except (ImportError, AttributeError) as error:
        raise Problem(f"cannot load the Celery app {name!r}: {error}") from error
    return app


def _queues_of(app: Celery | None) -> dict[str, Mapping[str, Any] | None]:
    if app is None:
        return {}
    from outbox.celery import installed

    try:
        queue = installed(app).queue
    except ConfigurationError:
        return {}
    return {queue.name: queue.queue_arguments or {}}


def _masked(finding: Finding) -> Finding:
    return Finding(finding.check, finding.level, masked(finding.found), finding.fix)


def _as_dict(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "level": finding.level.name,
        "found": finding.found,
        "fix": finding.fix,
    }


def _print(finding: Finding) -> None:
    from rich.markup import escape

    out = console()
    colour = _COLOURS[finding.level]
    out.print(
        f"[{colour}]{finding.level.name:<4}[/]  {finding.check:<27} "
        f"{escape(printable(finding.found))}",
        soft_wrap=True,
    )
    if finding.fix:
        out.print(f"{'':34}[bold]→[/] {escape(printable(finding.fix))}", soft_wrap=True)


def _print_verdict(findings: list[Finding]) -> None:
    counts = {level: sum(each.level is level for each in findings) for level in Level}
    console().print(
        f"\n{len(findings)} checks: {counts[Level.OK]} ok, "
        f"{counts[Level.WARN]} to look at, {counts[Level.FAIL]} failed"
    )
