"""Wheels of the distributions, what they contain, and environments that they are installed into."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = [ROOT / "core", *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]


class Environment:
    """A fresh environment. It also sees what is installed in `below`, so that this need not be installed again.

    Wheels are installed with the libraries that they need, and without other wheels of this repository.
    """

    def __init__(
        self, directory: Path, *wheels: Path, libraries: Sequence[str] = (), below: Environment | None = None
    ) -> None:
        venv.create(directory, with_pip=False)
        self.directory = directory
        self.binaries = directory / "bin"
        self.packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
        if below:
            (self.packages / "below.pth").write_text(f"{below.packages}\n")
        self._install([], [*libraries, *(one for wheel in wheels for one in needed_libraries(wheel))])
        self._install(["--no-deps"], [*map(str, wheels)])

    def _install(self, options: list[str], packages: list[str]) -> None:
        # pip refuses to install nothing.
        if not packages:
            return
        command = [sys.executable, "-m", "pip", "--python", str(self.directory), "install", "-q"]
        subprocess.run(
            [*command, "-c", str(ROOT / "constraints.txt"), *options, *packages], check=True, capture_output=True
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.binaries / "python"), *arguments]
        variables = {**os.environ, **environment}
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def requirements(wheel: Path) -> list[str]:
    """Returns what a wheel requires, extras too."""
    return metadata(wheel).get_all("Requires-Dist", [])


def needed_libraries(wheel: Path) -> list[str]:
    """Returns what a wheel requires besides wheels of this repository, without its extras."""
    return [one for one in requirements(wheel) if not one.startswith("vmconv") and "extra ==" not in one]
