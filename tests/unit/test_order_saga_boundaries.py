"""The services of the order saga share their contracts and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "order_saga"
PACKAGE = "examples.order_saga"
SERVICES = ("order", "inventory", "users", "shipping", "analytics")


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service_and_not_the_demo(service: str) -> None:
    own = (f"{PACKAGE}.{service}", f"{PACKAGE}.contracts")
    files = sorted((EXAMPLE / service).glob("*.py"))
    foreign = {
        f"{file.name} imports {name}"
        for file in files
        for name in imports_of(file)
        if name.startswith((f"{PACKAGE}.", ".")) and not name.startswith(own)
    }
    assert {file.name for file in files} >= {"models.py", "service.py", "app.py"}
    assert foreign == set()


def test_the_contracts_import_no_service() -> None:
    assert not [name for name in imports_of(EXAMPLE / "contracts.py") if name.startswith(PACKAGE)]


def test_nobody_mentions_analytics_but_itself_and_those_who_run_it() -> None:
    mentioning = {
        file.relative_to(EXAMPLE).parts[0]
        for service in SERVICES
        for file in (EXAMPLE / service).glob("*.py")
        if "analytics" in file.read_text().lower()
    }
    assert mentioning == {"analytics"}
