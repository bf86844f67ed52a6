"""The Debian package: built by apt's tools, clean for lintian, and what it installs works."""

from __future__ import annotations

import os
import re
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


def test_what_apt_installs_works_and_can_be_removed(package: Path, tmp_path: Path) -> None:
    """Apt installs the package into a copy of this system that only these commands see, and that goes with them."""
    oracle_program("apt-get")
    shutil.copy(package, tmp_path / "vmconv.deb")
    disk, made, again = (tmp_path / name for name in ("disk.img", "disk.vhdx", "again.qcow2"))
    inside = (
        f"apt-get install -qq -y --no-install-recommends {tmp_path}/vmconv.deb > {tmp_path}/apt 2>&1",
        "dpkg-query --show --showformat '${db:Status-Status}\\n' vmconv",
        "ls /usr/lib/vmconv/lib/python3*/site-packages",
        f"vmconv convert {disk} {made}",
        f"vmconv compare {disk} {made}",
        "ln -s /usr/bin/vmconv-qemu-img /usr/local/bin/qemu-img",
        f"VMCONV_QEMU_IMG_LOG=/dev/stdout qemu-img create -f qcow2 {again} 1M",
        f"VMCONV_QEMU_IMG_LOG=/dev/stdout qemu-img check {again}",
        "man -w vmconv vmconv-mount vmconv-qemu-img",
        f"apt-get purge -qq -y vmconv > {tmp_path}/apt 2>&1",
        "for path in /usr/lib/vmconv /usr/bin/vmconv*; do if [ -e $path ]; then echo left: $path; fi; done",
    )
    disk.write_bytes(b"payload!" * 512)
    path = "export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    (tmp_path / "inside.sh").write_text("\n".join(("set -e", path, *inside)))
    outside = (
        f"cd {tmp_path / 'layer'}",
        "mount -t tmpfs tmpfs .",
        "cd $PWD",
        "mkdir upper work root",
        "mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root",
        "mount -t proc proc root/proc",
        "mount --rbind /dev root/dev",
        f"chroot root sh {tmp_path}/inside.sh",
    )
    (tmp_path / "layer").mkdir()
    listed = run("unshare", "--mount", "sh", "-ec", "\n".join(outside)).split("\n")
    assert listed[0] == "installed"
    for folder in DISTRIBUTIONS:
        name = "vmconv" if folder.name == "core" else f"vmconv_{folder.name}"
        assert (name in listed) == (folder.name not in ("fleet", "s3", "swift")), name
    assert f"vmconv: create -f qcow2 {again} 1M" in listed
    # Another qemu-img, and not the link, answers the rest.
    assert any(re.fullmatch(r"/usr/s?bin/qemu-img: check .*", line) for line in listed)
    assert not [line for line in listed if line.startswith("left: ")]
