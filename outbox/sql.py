"""SQL text with the schema name put in, checked once: the only place where a name enters SQL as text."""

from __future__ import annotations

import re
from functools import lru_cache

from outbox.errors import ConfigurationError

DEFAULT_SCHEMA = "outbox"

_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]{0,62}")


def checked_identifier(name: str) -> str:
    """Return *name* if it can stand in SQL unquoted.

    Raises `ConfigurationError` for anything but lower-case letters, digits and underscores, 63 characters at most.
    """
    if not _IDENTIFIER.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot name a database schema: use lower-case letters, digits and underscores, "
            "not starting with a digit, at most 63 characters"
        )
    return name


def briefly(lock_timeout: str) -> str:
    """First in a transaction whose locks others meet: it waits *lock_timeout* for each of them, and holds none for
    long should its process be paused in the middle of it."""
    return (
        f"SELECT set_config('lock_timeout', '{lock_timeout}', true), "
        "set_config('idle_in_transaction_session_timeout', '1s', true)"
    )


@lru_cache(maxsize=512)
def in_schema(template: str, schema: str) -> str:
    """Replace each `{schema}` in *template* by the checked *schema*. Values never enter this way: they are bound."""
    return template.replace("{schema}", checked_identifier(schema))
