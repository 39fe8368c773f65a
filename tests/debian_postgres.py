"""The PostgreSQL that the operating system brings: an older one than the wheel's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.local_servers import LocalPostgres

_INSTALLED = Path("/usr/lib/postgresql")


class DebianPostgres(LocalPostgres):
    """PostgreSQL from Debian's own package, newest version first; quick, not durable."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.settings = {"fsync": "off", "unix_socket_directories": str(directory)}

    @staticmethod
    def programs() -> Path | None:
        found = sorted(_INSTALLED.glob("*/bin/initdb"), key=lambda each: int(each.parts[-3]))
        return found[-1].parent if found else None

    def _prepare(self) -> None:
        if self._user():
            shutil.chown(self.directory, self._user())
        if not (self.directory / "data").exists():
            programs = self.programs()
            assert programs is not None
            subprocess.run(
                [programs / "initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8"],
                cwd=self.directory,
                user=self._user(),
                check=True,
                capture_output=True,
            )

    def _command(self) -> list[str]:
        programs = self.programs()
        assert programs is not None
        return [
            str(programs / "postgres"),
            *("-D", str(self.directory / "data"), "-h", "127.0.0.1", "-p", str(self.port)),
            *(part for each in self.settings.items() for part in ("-c", "=".join(each))),
        ]

    def _user(self) -> str | None:
        return "postgres" if os.getuid() == 0 else None
