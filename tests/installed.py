"""The distribution as a user has it: a wheel, built from this tree, in a virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_IN_THE_WHEEL = ("outbox", "saga", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel; its dependencies are those of the running one."""

    directory: Path

    def run(
        self,
        *command: str,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, with no OUTBOX_* variables but those given."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OUTBOX_", "PYTHON")) and name != "NO_COLOR"
        }
        return subprocess.run(
            [str(self.directory / "bin" / command[0]), *command[1:]],
            cwd=cwd,
            env={**inherited, **(environment or {})},
            input=stdin,
            text=True,
            capture_output=True,
            check=False,
            timeout=60,
        )


def install(directory: Path) -> Installed:
    """Build the wheel from a copy of the tree, as others work in it, and install it offline."""
    source = directory / "source"
    source.mkdir(parents=True)
    for name in _IN_THE_WHEEL:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
        elif name == "README.md":
            (source / name).write_text("")
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(directory), str(source))
    (wheel,) = directory.glob("*.whl")
    home = directory / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(home)})
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    _pip("install", str(wheel), into=home)
    return Installed(home)


def _pip(verb: str, *arguments: str, into: Path | None = None) -> None:
    elsewhere = ["--python", str(into)] if into else []
    offline = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", *elsewhere, verb, *offline, *arguments],
        check=True,
        capture_output=True,
        timeout=120,
    )
