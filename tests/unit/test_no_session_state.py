"""What is sent to PostgreSQL rests on no session: the next statement may be answered by another one (pgbouncer)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[2]
OF_A_SESSION: Final = {
    "a lock that outlives its transaction": r"\bpg_(try_)?advisory_(?!xact_)\w+",
    "a setting that outlives its transaction": (
        r"(\A|;)\s*SET\s+(?!LOCAL\b|TRANSACTION\b)|\bset_config\s*\((?!([^()]|\([^()]*\))*,\s*true\s*\))"
    ),
    "a statement, cursor or table of a session": (
        r"(\A|;)\s*(PREPARE|DEALLOCATE|DISCARD|RESET)\s|\bWITH\s+HOLD\b|\bCREATE\s+(LOCAL\s+)?TEMP"
    ),
    "listening": r"(\A|;)\s*(UN)?LISTEN\b",
    "the sequence's last value of a session": r"\b(currval|lastval)\s*\(",
}
KNOWN: Final = {
    ("outbox/listening.py", "listening"),  # not behind a pooler, and nothing rests on it
    ("outbox/relay.py", "a setting that outlives its transaction"),  # as little
}


def texts(source: str) -> Iterator[str]:
    """The strings of a module, those that document it too; what is put into an f-string is left out."""
    nodes = list(ast.walk(ast.parse(source)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "_" for part in node.values
            )
        elif isinstance(node, ast.Constant) and id(node) not in parts:
            value = node.value
            yield value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def found(source: str) -> set[str]:
    """What rests on a session in the SQL of a module."""
    return {
        what
        for text in texts(source)
        for what, pattern in OF_A_SESSION.items()
        if re.search(pattern, text)
    }


def test_no_statement_rests_on_a_session() -> None:
    files = sorted(path for name in ("outbox", "saga") for path in (ROOT / name).rglob("*.py"))
    assert {
        (str(path.relative_to(ROOT)), what) for path in files for what in found(path.read_text())
    } == KNOWN


def test_nobody_waits_for_an_advisory_lock_but_who_migrates() -> None:
    waiting = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "outbox").rglob("*.py"))
        if any(re.search(r"\bpg_advisory_", one) for one in texts(path.read_text()))
    ]
    assert waiting == ["outbox/schema/component.py"]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_try_advisory_lock(hashtext('{schema}'))",
        "SELECT pg_advisory_unlock_all()",
        "SET plan_cache_mode = force_generic_plan",
        "SELECT 1; SET SESSION lock_timeout = 1",
        "SELECT set_config('lock_timeout', '1s', false)",
        "SELECT set_config('a', current_setting('b'), false), set_config('c', 'd', true)",
        "LISTEN outbox",
        "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "CREATE TEMPORARY TABLE t (n int)",
        "SELECT currval('s')",
    ],
)
def test_one_that_did_would_be_found(statement: str) -> None:
    assert found(f"STATEMENT = {statement!r}")
    assert found(f"connection.execute(f{statement!r}.encode())".replace("{schema}", "{name}"))


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT pg_try_advisory_xact_lock(1)",
        "SET LOCAL lock_timeout = '50ms'",
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "SELECT set_config('a', current_setting('b'), true), set_config('c', 'd', true)",
        "UPDATE t\nSET a = 1",
    ],
)
def test_one_that_does_not_is_not(statement: str) -> None:
    assert found(f"STATEMENT = {statement!r}") == set()
