"""The distributions as users get them: built as wheels, installed into fresh environments."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.wheels import DISTRIBUTIONS, ROOT, Environment, members, metadata, requirements

VERSIONS = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
NAMES = [path.name for path in DISTRIBUTIONS]

CORE_TESTS = ("core/test_extents.py", "core/test_blocks.py", "backends/test_backends.py")

NEEDED_BY_TESTS = (
    "pytest",
    "hypothesis",
    "dissect.archive",
    "dissect.hypervisor",
    "tree-sitter",
    "tree-sitter-powershell",
)


@pytest.fixture(scope="session")
def core(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Core without plugins."""
    return Environment(tmp_path_factory.mktemp("core"), wheels["core"])


@pytest.fixture(scope="session")
def tools(core: Environment, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory of packages that only the tests need."""
    return str(Environment(tmp_path_factory.mktemp("tools"), libraries=NEEDED_BY_TESTS, below=core).packages)


def with_needed(name: str, wheels: dict[str, Path]) -> list[Path]:
    """Returns the wheel of a plugin and those of the plugins that it needs."""
    needed = re.findall(r"^vmconv-([a-z0-9]+)==", "\n".join(requirements(wheels[name])), re.M)
    return [wheels[name], *(wheels[one] for one in needed)]


def own_tests(name: str) -> list[str]:
    """Returns what runs in an environment with one plugin: the conformance kit, or tests of core alone."""
    if name == "core":
        return [f"tests/{path}" for path in CORE_TESTS]
    return [
        f"{path.relative_to(ROOT)}::{kit}"
        for path in ROOT.glob(f"tests/*/{name}/test_{name}.py")
        for kit in re.findall(rf"^class (Test{name})\b", path.read_text(), re.IGNORECASE | re.MULTILINE)
    ]


@pytest.mark.parametrize("name", sorted(NAMES, key=lambda name: name != "qcow2"))
def test_a_plugin_works_without_the_others(
    name: str, wheels: dict[str, Path], core: Environment, tools: str, tmp_path: Path
) -> None:
    alone = core if name == "core" else Environment(tmp_path / name, *with_needed(name, wheels), below=core)
    without_tools = alone.run("-m", "vmconv", "formats")
    assert without_tools.returncode == 0, without_tools.stderr
    pytest_run = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/package/alone.py", *own_tests(name))
    done = alone.run(*pytest_run, PYTHONPATH=tools, VMCONV_ALONE=name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_formats_have_a_conformance_kit() -> None:
    formats = {path.parent.name for room in ("formats", "machine") for path in ROOT.glob(f"tests/{room}/*/test_*.py")}
    assert {"qcow2", "raw"} <= formats
    assert [name for name in formats & set(NAMES) if not own_tests(name)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_has_licence_type_marker_and_metadata(wheels: dict[str, Path], name: str) -> None:
    found = members(wheels[name])
    assert any(member.endswith("/py.typed") for member in found)
    assert any(member.endswith("licenses/LICENSE") for member in found)
    assert not any(member.startswith(("tests", "src")) for member in found)
    # For every processor.
    assert wheels[name].name.endswith("-py3-none-any.whl")
    fields = metadata(wheels[name])
    assert set(fields.get_all("Classifier", [])) >= VERSIONS
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert fields["Summary"]
    assert len(fields.get_payload()) > 50


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_installs_its_manual_pages(wheels: dict[str, Path], name: str) -> None:
    (source,) = (path for path in DISTRIBUTIONS if path.name == name)
    installed = {Path(one).name for one in members(wheels[name]) if "/data/share/man/man1/" in one}
    assert installed == {path.name for path in source.glob("man/*")}


def test_metadata_passes_the_check_of_the_package_index(wheels: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, wheels.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_together_convert(wheels: dict[str, Path], tmp_path: Path) -> None:
    program = str(Environment(tmp_path / "all", *wheels.values()).binaries / "vmconv")
    listed = subprocess.run([program, "formats", "--kind", "disk"], capture_output=True, text=True, check=True).stdout
    formats = {line.split()[0] for line in listed.split("\n\n")[0].splitlines()[1:]}
    # The folder of a second format of a plugin has its name, too.
    rooms = {path.name for path in (ROOT / "tests/formats").iterdir()}
    assert formats == rooms & {*NAMES, "qcow"}
    subprocess.run([program, "demo", "--size", "8M", "--directory", str(tmp_path)], check=True)
