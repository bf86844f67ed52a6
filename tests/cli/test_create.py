"""`vmconv create`: empty disks and layers, read, checked and written to by QEMU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.variants import QEMU_NAMES
from vmconv.cli.main import main

Capture = pytest.CaptureFixture[str]

WRITTEN = sorted(name for name, one in vmconv.installed().formats.items() if one.can_write)
LAYERED = sorted(name for name in WRITTEN if vmconv.installed().formats[name].supports_backing)
BASES = {name: name for name in LAYERED if name in ("vmdk", "vhd", "vhdx", "vdi")}
"""The only format of a base, for formats whose base has their own format."""


def new(name: str, directory: Path, stem: str = "new") -> Path:
    return directory / f"{stem}{vmconv.installed().formats[name].suffixes[0]}"


def sparse(path: Path, size: int, content: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    return path


@pytest.mark.parametrize("name", WRITTEN)
def test_qemu_reads_zeros_and_writes_into_a_new_disk(name: str, tmp_path: Path, qemu_img: QemuImg) -> None:
    path, qemu = new(name, tmp_path), QEMU_NAMES.get(name, name)
    result = vmconv.create(path, 24 * MIB)
    assert (result.target_format, result.totals.copied, result.totals.shared) == (name, 0, 0)
    zeros = sparse(tmp_path / "zeros.raw", 24 * MIB)
    qemu_img("compare", "-f", qemu, "-F", "raw", path, zeros)
    qemu_io(path, "write -P 7 8M 1M", format_name=qemu)
    qemu_io(zeros, "write -P 7 8M 1M", format_name="raw")
    assert vmconv.compare(path, zeros)
    report = vmconv.check(path)
    assert report is None or not report.errors


@pytest.mark.parametrize("name", LAYERED)
def test_a_new_layer_reads_as_its_base(name: str, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", 4 * MIB)
    base = new(BASES.get(name, "qcow2"), tmp_path, "base")
    vmconv.convert(disk, base)
    layer = new(name, tmp_path, "layer")
    result = vmconv.create(layer, backing_file=base.name)
    assert result.totals.copied == 0
    assert vmconv.compare(layer, disk)
    if name != "vdi":
        # A VDI names its parent by id.
        assert vmconv.info(layer)["backing-filename"] == base.name


def test_a_guest_writes_into_a_larger_layer_and_not_into_its_base(tmp_path: Path, qemu_img: QemuImg) -> None:
    base = make_disk(tmp_path / "base.raw", 4 * MIB)
    before = base.read_bytes()
    assert main(["create", "-q", "-b", "base.raw", "-F", "raw", str(tmp_path / "layer.qcow2"), "8M"]) == 0
    qemu_io(tmp_path / "layer.qcow2", "write -P 5 0 1M", "write -P 6 6M 1M", format_name="qcow2")
    expected = sparse(tmp_path / "expected.raw", 8 * MIB, before)
    qemu_io(expected, "write -P 5 0 1M", "write -P 6 6M 1M", format_name="raw")
    qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / "layer.qcow2", expected)
    assert base.read_bytes() == before


def test_a_base_may_lie_elsewhere_if_the_user_names_it(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "layers").mkdir()
    make_disk(tmp_path / "bases/base.raw", MIB)
    layer = tmp_path / "layers/layer.qcow2"
    vmconv.create(layer, backing_file="../bases/base.raw", backing_format="raw")
    assert vmconv.compare(layer, tmp_path / "bases/base.raw", allow_external=[tmp_path / "bases"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["new.qcow2"], 2, "a new disk needs a size"),
        (["new.qcow2", "0"], 2, "a new disk needs a size"),
        (["new.qcow2", "1000"], 2, "size 1000 is not a positive multiple of 512\n  hint: the next one is 1024"),
        (["new", "1M"], 2, "its name has no format's suffix\n  hint: name the format with -f"),
        (["there.raw", "1M"], 4, "already exists"),
        (["new.vhd", "4T"], 1, "VHD cannot hold 4398046511104 bytes"),
        (["-b", "missing.qcow2", "new.qcow2"], 1, "missing.qcow2: cannot be opened"),
        (["-F", "raw", "new.qcow2", "1M"], 2, "a backing format needs a backing file"),
        (["-b", "there.raw", "new.raw"], 2, "raw cannot have a backing file"),
        (["-b", "there.raw", "-F", "qcow2", "new.qcow2"], 1, "no qcow2 signature"),
        (["nowhere/new.raw", "1M"], 1, "its directory does not exist"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_disk(tmp_path / "there.raw", MIB)
    before = (tmp_path / "there.raw").read_bytes()
    assert main(["create", *arguments]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.raw"]
    assert (tmp_path / "there.raw").read_bytes() == before


def test_force_replaces_a_file(tmp_path: Path, capsys: Capture) -> None:
    old = make_disk(tmp_path / "disk.raw", MIB)
    assert main(["create", "--force", "--output", "json", str(old), "2M"]) == 0
    assert json.loads(capsys.readouterr().out)["target_format"] == "raw"
    assert old.read_bytes() == bytes(2 * MIB)


def test_the_backend_is_one_of_that_filesystem(
    ext4_dir: Path, xfs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory, backend in ((ext4_dir, "copy"), (xfs_dir, "reflink")):
        assert main(["create", "--output", "json", str(directory / "disk.qcow2"), "8M"]) == 0
        assert json.loads(capsys.readouterr().out)["backend"] == backend
