"""Options that the commands share, and how they get from a URL to a database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from outbox.errors import ConfigurationError
from outbox.sql import DEFAULT_SCHEMA, checked_identifier

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

F = TypeVar("F", bound=Callable[..., Any])


def _url_or_file(
    _context: click.Context, _option: click.Parameter, given: str | None
) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise click.BadParameter(f"cannot read {given[1:]!r}: {error.strerror}") from error


def urls_or_files(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """Several URLs, each of which may be `@FILE`."""
    return tuple(_url_or_file(context, option, one) or "" for one in given)


def _schema(_context: click.Context, _option: click.Parameter, given: str) -> str:
    try:
        return checked_identifier(given)
    except ConfigurationError as error:
        raise click.BadParameter(str(error)) from error


def database_url(*, required: bool = True) -> Callable[[F], F]:
    """`--database-url`, whose value may be `@FILE`."""
    return click.option(
        "--database-url",
        envvar="OUTBOX_DATABASE_URL",
        show_envvar=True,
        required=required,
        callback=_url_or_file,
        metavar="URL",
        help="postgresql://... or @FILE with the URL in it: arguments show in process lists.",
    )


def broker_url(*, required: bool = True) -> Callable[[F], F]:
    """`--broker-url`, whose value may be `@FILE`."""
    return click.option(
        "--broker-url",
        envvar="OUTBOX_BROKER_URL",
        show_envvar=True,
        required=required,
        callback=_url_or_file,
        metavar="URL",
        help="amqp://..., redis://..., kafka://... or @FILE with the URL in it.",
    )


schema = click.option(
    "--schema",
    envvar="OUTBOX_SCHEMA",
    show_envvar=True,
    default=DEFAULT_SCHEMA,
    show_default=True,
    callback=_schema,
    help="PostgreSQL schema that holds the tables.",
)
exchange = click.option(
    "--exchange",
    envvar="OUTBOX_EXCHANGE",
    show_envvar=True,
    default="events",
    show_default=True,
    help="The topic exchange that events go to.",
)
log_level = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
yes = click.option("--yes", is_flag=True, help="Do not ask.")


@contextmanager
def database(url: str, command: str) -> Iterator[Engine]:
    """An engine without a pool for *url*, closed at the end; *command* shows in pg_stat_activity.

    Raises `ConfigurationError` for anything but a PostgreSQL URL.
    """
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.pool import NullPool

    from outbox.pooler import mind_poolers

    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError(
            "the database URL cannot be read: expected postgresql://user@host:port/name"
        ) from error
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise ConfigurationError(
            f"the database URL names {parsed.get_backend_name()!r}, and this needs PostgreSQL"
        )
    engine = create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        poolclass=NullPool,
        connect_args={"fallback_application_name": f"outbox {command}", "connect_timeout": 10},
    )
    try:
        yield mind_poolers(engine)
    finally:
        engine.dispose()


@contextmanager
def session(url: str, command: str) -> Iterator[Session]:
    """One transaction on the database at *url*, committed unless an exception passes."""
    from sqlalchemy.orm import Session

    with database(url, command) as engine, Session(engine) as opened, opened.begin():
        yield opened
