"""The documentation is true: every block of Python runs, every test that is named is there, every link leads somewhere.

Its commands are run in test_documented_commands.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


def test_the_readmes_example_works_when_pasted(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 36
    (tmp_path / "shop.py").write_text(example)
    ran = subprocess.run(
        [sys.executable, "shop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "left in stock: 4\n"


def test_the_guide_runs_from_its_first_line_to_its_last(database_url: str, tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "docs" / "guide.md", "python"))
    (tmp_path / "guide.py").write_text(f"DATABASE_URL = {database_url!r}\n{code}")
    ran = subprocess.run(
        [sys.executable, "guide.py"], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert ran.returncode == 0, ran.stderr
    assert "is no event type" in ran.stdout


def test_the_tests_in_the_guide_pass(database_url: str, tmp_path: Path) -> None:
    # Up to them, as the guide goes on to a version of an event that these services do not take.
    until = blocks(ROOT / "docs" / "guide.md", "python")
    last = max(n for n, block in enumerate(until) if "\ndef test_" in block)
    code = "\n".join(until[: last + 1])
    (tmp_path / "test_guide.py").write_text(f"DATABASE_URL = {database_url!r}\n{code}")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "saga.testing.pytest_plugin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout


def test_every_test_that_the_guarantees_rest_on_exists() -> None:
    named = re.findall(
        r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()
    )
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [
        f"{file}::{test}" for file, test in named if f"def {test}(" not in files.get(file, "")
    ]
    assert named
    assert missing == []


def test_links_between_the_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
