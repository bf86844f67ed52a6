"""The Debian package: built by apt's tools, clean for lintian, and what it installs works."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import versions
from support.requirements import oracle_program
from support.wheels import DISTRIBUTIONS, ROOT


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command and returns its output."""
    # The least time for a package that nobody keeps.
    environment = {**os.environ, "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_changelog_has_the_version() -> None:
    oracle_program("dpkg-parsechangelog")
    version = run("dpkg-parsechangelog", "--show-field", "Version").strip()
    assert version == versions.debian_version(versions.current_version(ROOT))


@pytest.mark.parametrize(
    ("version", "debian"),
    [("1.0.0", "1.0.0"), ("1.0.0a1", "1.0.0~a1"), ("1.0.0b2", "1.0.0~b2"), ("1.0.0rc3", "1.0.0~rc3")],
)
def test_a_candidate_is_older_than_its_release_for_debian(version: str, debian: str) -> None:
    oracle_program("dpkg")
    assert versions.debian_version(version) == debian
    run("dpkg", "--compare-versions", debian, "le", "1.0.0")


def test_a_release_is_the_only_entry(tmp_path: Path) -> None:
    for path in versions.versioned_files(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    oracle_program("dpkg-parsechangelog")
    versions.set_version(tmp_path, "12.0.0rc3", "2027-02-03")
    fields = run("dpkg-parsechangelog", "--all", cwd=tmp_path)
    assert "\nVersion: 12.0.0~rc3\n" in fields
    assert "\nDate: Wed, 03 Feb 2027 00:00:00 +0000\n" in fields
    assert "Release 12.0.0~rc3. " in fields


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The binary package, built from the files of the repository and no others."""
    for program in ("dpkg-buildpackage", "dh"):
        oracle_program(program)
    directory = tmp_path_factory.mktemp("debian")
    source = directory / "vmconv"
    for name in run("git", "ls-files", "-z").split("\0"):
        # Tests and benchmarks are in no package.
        if name and not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).is_file():
            copy = source / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy)
    run(source / "debian/vendor")
    run("dpkg-buildpackage", "--unsigned-source", "--unsigned-changes", "--build=binary", cwd=source)
    (built,) = directory.glob("vmconv_*.deb")
    return built


def test_lintian_finds_nothing(package: Path) -> None:
    oracle_program("lintian")
    (changes,) = package.parent.glob("*.changes")
    # The tests run as root; lintian warns about that.
    run("lintian", "--allow-root", "--fail-on", "error,warning", changes)


def test_what_is_installed_converts(package: Path, tmp_path: Path) -> None:
    """The package's files are laid over /usr for these commands alone."""
    run("dpkg-deb", "--extract", package, tmp_path / "root")
    (tmp_path / "disk.img").write_bytes(b"payload!" * 512)
    commands = (
        f"mount -t overlay overlay -o lowerdir={tmp_path}/root/usr:/usr /usr",
        "ls /usr/lib/vmconv/lib/python3*/site-packages",
        f"vmconv convert {tmp_path}/disk.img {tmp_path}/disk.vhdx",
        f"vmconv compare {tmp_path}/disk.img {tmp_path}/disk.vhdx",
        "man -w vmconv vmconv-mount",
    )
    listed = run("unshare", "--mount", "sh", "-ec", "export PATH=/usr/bin:/bin; " + "; ".join(commands)).split()
    for path in DISTRIBUTIONS:
        name = "vmconv" if path.name == "core" else f"vmconv_{path.name}"
        assert (name in listed) == (path.name not in ("fleet", "swift")), name
