"""What the commands print: tables for people, JSON for programs, problems for both; no secrets."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timedelta
from typing import Any, NoReturn, ParamSpec
from uuid import UUID

import click

P = ParamSpec("P")

_WIDTH_OF_A_PIPE = 200
_PASSWORD_IN_URL = re.compile(r"(?<=://)([^/@\s]*?):[^@\s]*(?=@)|(?<=[?&]password=)[^&\s]+")
_PASSWORD_IN_CONNINFO = re.compile(r"(?<=\bpassword=)('[^']*'|[^\s&]+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Problem(click.ClickException):
    """Something is wrong; shown without a traceback, and the exit code is 1."""


class CalledWrongly(Problem):
    """What the command was pointed at cannot be used; the exit code is 2."""

    exit_code = 2


def masked(text: str) -> str:
    """*text* without the passwords of URLs and connection strings in it."""
    text = _PASSWORD_IN_URL.sub(lambda found: f"{found[1]}:***" if found[1] else "***", text)
    return _PASSWORD_IN_CONNINFO.sub("***", text)


def printable(text: str) -> str:
    """*text* from a message or a traceback, unable to steer the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def reporting_problems(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors of this package, of the database and of the broker into a message and exit 1 (2
    for `CalledWrongly`).

    With `--json` the message is `{"error": ...}` on standard output.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            message = _explained(error)
            if message is None:
                raise
            if kwargs.get("as_json"):
                print_json({"error": message})
                sys.exit(error.exit_code if isinstance(error, Problem) else 1)
            if isinstance(error, Problem):
                raise
            raise Problem(message) from error

    return run


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, default=_plain, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str) -> None:
    """A table for a person; colours and boxes only where there is a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(_cell(value))) for value in row))
    console().print(table)


def console() -> Any:
    """Standard output through rich, which minds NO_COLOR."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, highlight=False)


def first_line(text: str, width: int = 120) -> str:
    """The first line of *text*, cut to *width* characters."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= width else f"{line[: width - 1]}…"


def ago(duration: timedelta | None) -> str:
    """A duration in its largest two units: `3 h 12 min`; a dash for None."""
    if duration is None:
        return "-"
    seconds = max(duration.total_seconds(), 0.0)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds_left = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds_left} s"
    hours, minutes_left = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes_left} min"
    return f"{hours // 24} d {hours % 24} h"


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be taken back; without a terminal, refuse."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Problem(f"{question} Nothing was done: there is nobody to ask; pass --yes.")
    click.confirm(question, abort=True)


def not_found(what: str) -> NoReturn:
    """Say that there is no such thing, with exit code 1."""
    raise Problem(f"there is no {what}")


def _explained(error: Exception) -> str | None:
    import psycopg
    from sqlalchemy.exc import DBAPIError

    from outbox.errors import OutboxError

    if isinstance(error, Problem):
        return error.message
    if isinstance(error, DBAPIError):
        return masked(f"database: {error.orig}".strip())
    if isinstance(error, psycopg.Error):
        return masked(f"database: {error}".strip())
    if isinstance(error, OutboxError | OSError):
        return masked(str(error))
    return None


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="seconds")
    if isinstance(value, timedelta):
        return ago(value)
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
