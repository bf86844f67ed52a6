"""File names in images are the bytes of the names, whatever encoding the locale says names have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.requirements import missing
from vmconv.errors import AccessError, PlanError
from vmconv.io.known import qemu_name

USUAL = {"LC_ALL": "C.utf8"}
NAMES = ["größe ディスク", "Åland à", "latin-\udce9"]
"""The last one is no UTF-8."""


def latin(directory: Path) -> Mapping[str, str]:
    """Returns the environment of a locale whose encoding is ISO-8859-1, made here."""
    made = directory / "en_US.ISO-8859-1"
    command = ["localedef", "-f", "ISO-8859-1", "-i", "en_US", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except OSError as exc:
        missing("oracle", f"localedef: {exc}")
    if not made.exists():
        missing("oracle", f"no locale of ISO-8859-1 can be made: {done.stderr.strip()}")
    return {"LOCPATH": str(directory), "LC_ALL": "en_US.ISO-8859-1"}


@pytest.fixture(params=["utf-8", "ascii", "iso8859-1"])
def locale(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a process whose file names have this encoding."""
    if request.param == "iso8859-1":
        return latin(tmp_path_factory.mktemp("locale"))
    if request.param == "ascii":
        return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return USUAL


def run(locale: Mapping[str, str], cwd: Path, *arguments: bytes | str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, "-m", "vmconv", *arguments]
    done = subprocess.run(command, env={**kept, **locale}, cwd=cwd, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="surrogateescape")


FORMATS = ["qcow2", "qed", "vmdk", "vhd", "vhdx"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_chain_has_the_names_of_its_files_whatever_the_locale(
    tmp_path: Path, locale: Mapping[str, str], format_name: str, name: str
) -> None:
    """Made under one locale and read under UTF-8, and the other way round."""
    if name == NAMES[-1] and format_name in ("vhd", "vhdx"):
        pytest.skip("its names are UTF-16")
    raw = make_disk(tmp_path / "disk.raw", MIB)
    sources = tmp_path / "sources"
    sources.mkdir()
    base, top = (os.fsencode(f"{name}.{what}.qcow2") for what in ("base", "top"))
    run(USUAL, sources, "convert", "-q", "../disk.raw", base)
    qemu: list[str | bytes] = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top]
    subprocess.run(qemu, cwd=sources, check=True, timeout=600)
    made = [os.fsencode(f"{name}.{what}.{format_name}") for what in ("base", "top")]
    for maker, reader in ((locale, USUAL), (USUAL, locale)):
        run(maker, tmp_path, "convert", "-q", "--force", "--chain", b"sources/" + top, made[1])
        run(reader, tmp_path, "convert", "-q", "--force", made[1], "got.raw")
        assert (tmp_path / "got.raw").read_bytes() == raw.read_bytes()
    names = {os.fsencode(path.name) for path in tmp_path.iterdir()}
    assert names == {b"disk.raw", b"got.raw", b"sources", *made}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_images_are_kept_as_bytes(tmp_path: Path, locale: Mapping[str, str], name: str) -> None:
    make_disk(tmp_path / "disk.raw", MIB).rename(tmp_path / f"{name}.raw")
    source = os.fsencode(f"{name}.raw")
    for target, options in (("ref.vmdk", "subformat=reference"), ("ref.qcow2", "subformat=reference")):
        run(locale, tmp_path, "convert", "-q", source, target, "-o", options)
        assert source in (tmp_path / target).read_bytes()
        run(USUAL, tmp_path, "compare", source, target)
        run(locale, tmp_path, "compare", source, target)
        run(locale, tmp_path, "check", target)
    run(locale, tmp_path, "convert", "-q", source, os.fsencode(f"{name}.vmdk"), "-o", "subformat=monolithicFlat")
    assert os.fsencode(f"{name}-flat.vmdk") in (tmp_path / f"{name}.vmdk").read_bytes()
    run(USUAL, tmp_path, "compare", source, os.fsencode(f"{name}.vmdk"))


def test_no_home_makes_no_directory_of_that_name(tmp_path: Path) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    environment = {"LC_ALL": "C.utf8", "PATH": os.environ["PATH"]}
    for home in ({}, {"HOME": ""}, {"HOME": "~"}):
        command = [sys.executable, "-m", "vmconv", "convert", "-q", "--force", "disk.raw", "disk.qcow2"]
        subprocess.run(command, env={**environment, **home}, cwd=tmp_path, check=True, timeout=600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2", "disk.raw"]


@pytest.mark.parametrize("name", ["x:y", "file:x", "nbd:x", "json:{}"])
@pytest.mark.parametrize("format_name", ["qcow2", "qed", "vmdk"])
def test_a_backing_file_whose_name_has_a_colon_is_no_protocol(
    tmp_path: Path, qemu_img: QemuImg, format_name: str, name: str
) -> None:
    """QEMU takes such a name for that of a protocol, and file:x for the file x."""
    raw = make_disk(tmp_path / "disk.raw", MIB)
    make_disk(tmp_path / f"x.{format_name}", MIB, seed=1)
    base = tmp_path / f"{name}.{format_name}"
    vmconv.convert(raw, base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", f"./{base.name}", "-F", format_name, tmp_path / "top.qcow2")
    for backing in (base.name, f"./{base.name}", base):
        kept = tmp_path / f"kept.{format_name}"
        vmconv.convert(tmp_path / "top.qcow2", kept, backing_file=backing, force=True)
        qemu_img("compare", "-f", "raw", "-F", format_name, raw, kept)
        assert vmconv.compare(raw, kept)
    (tmp_path / "chain").mkdir()
    top = tmp_path / "chain" / f"top.{format_name}"
    vmconv.convert(tmp_path / "top.qcow2", top, chain=True)
    qemu_img("compare", "-f", "raw", "-F", format_name, raw, top)
    assert vmconv.compare(raw, top)


def test_a_name_that_is_another_file_s_to_qemu_is_refused(tmp_path: Path, qemu_img: QemuImg) -> None:
    for seed, name in enumerate(("file:base.raw", "base.raw")):
        make_disk(tmp_path / name, MIB, seed=seed)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "file:base.raw", "-F", "raw", tmp_path / "top.qcow2", str(MIB))
    with pytest.raises(AccessError, match=r"QEMU opens 'base\.raw'"):
        vmconv.convert(tmp_path / "top.qcow2", tmp_path / "flat.raw")


@pytest.mark.parametrize("name", ["a\\b", "..\\x", "\\\\host\\x", "latin-\udce9"])
@pytest.mark.parametrize("format_name", ["vhd", "vhdx"])
def test_a_name_that_no_path_of_windows_is_is_refused(
    tmp_path: Path, qemu_img: QemuImg, format_name: str, name: str
) -> None:
    base, top = tmp_path / f"{name}.{format_name}", tmp_path / "top.qcow2"
    vmconv.convert(make_disk(tmp_path / "disk.raw", MIB), base)
    kind = qemu_name(format_name)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", kind, top], cwd=tmp_path, check=True
    )
    before = set(tmp_path.iterdir())
    for how in ({"backing_file": base.name}, {"chain": True}):
        with pytest.raises(PlanError, match="cannot be a Windows path"):
            vmconv.convert(top, tmp_path / f"new.{format_name}", **how)
    assert set(tmp_path.iterdir()) == before


def test_the_name_of_a_vmdk_s_parent_may_begin_and_end_with_spaces(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw, base = make_disk(tmp_path / "disk.raw", MIB), tmp_path / " a .vmdk "
    vmconv.convert(raw, base, target_format="vmdk")
    qemu_img("create", "-q", "-f", "vmdk", "-b", base.name, "-F", "vmdk", tmp_path / "top.vmdk")
    assert vmconv.compare(raw, tmp_path / "top.vmdk", backing_format="vmdk")
