"""The distributions as users get them: built as wheels, installed into fresh environments."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = [ROOT / "core", *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]

COMMANDS = {"fleet": ("fleet", "node"), "view": ("mount", "serve")}
"""Distributions that bring commands instead of formats."""


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution, by the name of its folder."""
    directory = tmp_path_factory.mktemp("wheels")
    built = {}
    for path in DISTRIBUTIONS:
        out = directory / path.name
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(path)]
        subprocess.run(command, check=True, capture_output=True)
        (built[path.name],) = out.glob("*.whl")
    return built


def members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.parametrize("name", [path.name for path in DISTRIBUTIONS])
def test_a_wheel_has_licence_type_marker_and_metadata(wheels: dict[str, Path], name: str) -> None:
    found = members(wheels[name])
    assert any(member.endswith("/py.typed") for member in found)
    assert any(member.endswith("licenses/LICENSE") for member in found)
    assert not any(member.startswith(("tests", "src")) for member in found)
    fields = metadata(wheels[name])
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert fields["Summary"]
    assert len(fields.get_payload()) > 50


def test_metadata_passes_the_check_of_the_package_index(wheels: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, wheels.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def install(directory: Path, *wheels: Path) -> Path:
    """Returns the bin directory of a fresh environment with these wheels."""
    venv.create(directory, with_pip=True)
    binaries = directory / "bin"
    constraints = ROOT / "constraints.txt"
    command = [str(binaries / "pip"), "install", "-q", "-c", str(constraints), *map(str, wheels)]
    subprocess.run(command, check=True, capture_output=True)
    return binaries


def formats(binaries: Path) -> list[str]:
    done = subprocess.run([str(binaries / "vmconv"), "formats"], capture_output=True, text=True, check=True)
    table = done.stdout.split("\n\n")[0]
    return [line.split()[0] for line in table.splitlines()[1:]]


def test_each_plugin_installs_and_works_without_the_others(wheels: dict[str, Path], tmp_path: Path) -> None:
    for name, wheel in wheels.items():
        if name != "core":
            binaries = install(tmp_path / name, wheels["core"], wheel)
            assert formats(binaries) == [name] * (name not in COMMANDS)
            for command in COMMANDS.get(name, ()):
                subprocess.run([str(binaries / "vmconv"), command, "--help"], check=True, capture_output=True)


def test_all_together_convert(wheels: dict[str, Path], tmp_path: Path) -> None:
    binaries = install(tmp_path / "all", *wheels.values())
    assert formats(binaries) == sorted(name for name in wheels if name not in ("core", *COMMANDS))
    subprocess.run([str(binaries / "vmconv"), "demo", "--size", "8M", "--directory", str(tmp_path)], check=True)
