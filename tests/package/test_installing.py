"""The commands of the guide's page on installing, with wheels and without an index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from support.wheels import DISTRIBUTIONS, ROOT, needed_libraries, requirements

PLUGINS = {f"vmconv-{path.name}" for path in DISTRIBUTIONS} - {"vmconv-core"}
LEFT_OUT = {"vmconv-fleet", "vmconv-s3", "vmconv-swift"}
"""They bring a server, and clients of clouds, with their libraries."""


@pytest.fixture(scope="session")
def house(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all wheels and what they need."""
    directory = tmp_path_factory.mktemp("house")
    libraries = {library for wheel in wheels.values() for library in needed_libraries(wheel)}
    command = [sys.executable, "-m", "pip", "download", "-q", "-c", str(ROOT / "constraints.txt"), "-d", str(directory)]
    # pipx wants a pip of its own.
    subprocess.run(
        [*command, "--only-binary", ":all:", "pip", "pytest", "hypothesis", "hatchling", *libraries], check=True
    )
    for wheel in wheels.values():
        shutil.copy(wheel, directory)
    return directory


def run(*command: str | Path, **variables: str | Path) -> str:
    """Runs a command and returns its output."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip_install(house: Path, directory: Path, *what: str) -> Path:
    """Makes an environment with what pip installs, and returns its Python."""
    venv.create(directory)
    python = directory / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--find-links", house, *what)
    return python


def installed_of_ours(python: Path) -> set[str]:
    code = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    return {name for name in run(python, "-c", code).split() if name.startswith("vmconv")}


def test_all_is_every_plugin_but_three(wheels: dict[str, Path]) -> None:
    found = re.findall(
        r"^(vmconv-\w+)==.*extra == ['\"]all['\"]", "\n".join(requirements(wheels["core"])), re.MULTILINE
    )
    assert set(found) == PLUGINS - LEFT_OUT


def test_pip_installs_what_converts(house: Path, tmp_path: Path) -> None:
    python = pip_install(house, tmp_path / "venv", "vmconv")
    assert installed_of_ours(python) == {"vmconv", "vmconv-raw"}
    (tmp_path / "disk.img").write_bytes(b"payload!" * 512)
    run(tmp_path / "venv/bin/vmconv", "convert", tmp_path / "disk.img", tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == b"payload!" * 512


def test_the_fleet_is_an_extra(house: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--find-links", house, "vmconv[fleet]"
    )
    assert installed_of_ours(python) == {"vmconv", "vmconv-raw", "vmconv-fleet"}
    assert "invite" in run(tmp_path / "venv/bin/vmconv", "node", "--help")


def test_pipx_installs_all(house: Path, tmp_path: Path) -> None:
    run(
        *(sys.executable, "-m", "pipx", "install", "vmconv[all]"),
        # The programs of uv may be beside pipx.
        PIPX_DEFAULT_BACKEND="pip",
        PIPX_HOME=tmp_path / "home",
        PIPX_BIN_DIR=tmp_path / "bin",
        PIPX_MAN_DIR=tmp_path / "man",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=house,
    )
    assert installed_of_ours(tmp_path / "home/venvs/vmconv/bin/python") == {"vmconv", *PLUGINS} - LEFT_OUT
    converts(tmp_path / "bin/vmconv", tmp_path)


def test_uv_installs_all(house: Path, tmp_path: Path) -> None:
    run(
        *(sys.executable, "-m", "uv", "tool", "install", "vmconv[all]"),
        UV_NO_INDEX="1",
        UV_FIND_LINKS=house,
        UV_TOOL_DIR=tmp_path / "tools",
        UV_TOOL_BIN_DIR=tmp_path / "bin",
        UV_CACHE_DIR=tmp_path / "cache",
        UV_PYTHON=sys.executable,
        UV_PYTHON_DOWNLOADS="never",
    )
    assert installed_of_ours(tmp_path / "tools/vmconv/bin/python") == {"vmconv", *PLUGINS} - LEFT_OUT
    converts(tmp_path / "bin/vmconv", tmp_path)


def converts(program: Path, directory: Path) -> None:
    (directory / "disk.img").write_bytes(b"payload!" * 512)
    run(program, "convert", directory / "disk.img", directory / "disk.vhdx")
    run(program, "compare", directory / "disk.img", directory / "disk.vhdx")


def test_a_new_plugin_passes_the_kit_as_it_is(house: Path, tmp_path: Path) -> None:
    python = pip_install(house, tmp_path / "venv", "vmconv[testing]")
    plugin = tmp_path / "vmconv-acme"
    run(tmp_path / "venv/bin/vmconv", "plugin", "new", "acme", "--directory", plugin)
    pip_install(house, tmp_path / "venv", str(plugin))
    tested = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", plugin, plugin / "tests")
    assert " passed" in tested
    assert "acme" in run(tmp_path / "venv/bin/vmconv", "formats", "--kind", "disk")
    (tmp_path / "disk.img").write_bytes(b"payload!" * 512)
    run(tmp_path / "venv/bin/vmconv", "convert", tmp_path / "disk.img", tmp_path / "disk.acme")
    run(tmp_path / "venv/bin/vmconv", "compare", tmp_path / "disk.img", tmp_path / "disk.acme")
