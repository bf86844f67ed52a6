"""Releases: one version, builds that are the same again."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import versions
from support.wheels import DISTRIBUTIONS, ROOT

RELEASE = [sys.executable, str(ROOT / ".ci/release.py")]


def test_all_distributions_have_one_version() -> None:
    version = versions.current_version(ROOT)
    for path in versions.versioned_files(ROOT):
        stated = re.findall(r'^version(?: = "|: )([^"\n]*)|vmconv[a-z0-9-]*==([^"]*)', path.read_text(), re.MULTILINE)
        assert {one or other for one, other in stated} <= {version}, path


def test_one_command_changes_the_version_everywhere(tmp_path: Path) -> None:
    old = versions.current_version(ROOT)
    for path in versions.versioned_files(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    versions.set_version(tmp_path, "12.0.0rc3")
    for distribution in DISTRIBUTIONS:
        path = tmp_path / distribution.relative_to(ROOT) / "pyproject.toml"
        assert tomllib.loads(path.read_text())["project"]["version"] == "12.0.0rc3"
    for path in versions.versioned_files(tmp_path):
        assert not re.search(rf"(vmconv\S*|version)\W+{re.escape(old)}\b", path.read_text()), path


@pytest.mark.parametrize("version", ["", "1", "1.0", "v1.0.0", "1.0.0-1", '1.0.0"\n', "1.0.0.dev1"])
def test_a_strange_version_is_refused(version: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not X\.Y\.Z"):
        versions.set_version(tmp_path, version)


def test_changes_without_a_release_are_refused(tmp_path: Path) -> None:
    """Until the fragments are in a release; then the command has nothing to refuse."""
    assert list((ROOT / "changelog.d").glob("*.*.md"))
    done = subprocess.run([*RELEASE, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "are in no release" in done.stderr
    assert not (tmp_path / "out").exists()


def test_everything_of_a_release_is_built_twice_and_equal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([*RELEASE, "--trial", "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sums = (out / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in map(str.split, sums)}
    assert len(listed) == 2 * len(DISTRIBUTIONS)
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())
    again = subprocess.run([*RELEASE, "--trial", "--out", str(out)], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (1, f"{out} is not empty\n")
