"""Conversion by reference: payload stays in the source's files, on any filesystem, and a later change is noticed."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmconv
from support.corpus import ROWS, digest, unpack
from support.disks import MIB, QemuImg, make_disk, process_io, qemu_io, scribble
from support.qcow2_images import BACKING_FORMAT, extension, image
from support.requirements import missing
from support.variants import QEMU_NAMES, Variant, is_compressed, make, self_contained
from vmconv.cli.main import main
from vmconv.errors import AccessError, PlanError, UsageError, ZeroCopyError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.references import Fingerprint, Record, read_records, settle
from vmconv_qcow2 import structs

SIZE = 12 * MIB
VMDK = {"subformat": "reference"}
OVERLAY = {"subformat": "reference"}

SOURCES = self_contained()


def names(variant: Variant) -> str:
    return "-".join(filter(None, variant))


def by_reference(source: Path, target: Path, **more: Any) -> vmconv.Result:
    return vmconv.convert(str(source), str(target), options={"subformat": "reference"}, **more)


def state(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Returns what tells that nobody wrote to the files of a directory."""
    return {path.name: (s.st_size, s.st_mtime_ns, s.st_ino) for path in directory.iterdir() for s in [path.stat()]}


# -- every format, on every filesystem


@pytest.mark.parametrize("target", ["vmdk", "qcow2"])
@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_qemu_reads_the_same_disk_and_nothing_is_copied(
    any_dir: Path, qemu_img: QemuImg, source: Variant, target: str
) -> None:
    raw = make_disk(any_dir / "disk.raw", SIZE)
    image = make(raw, source, any_dir)
    before = state(image.parent)
    path = any_dir / f"new.{target}"
    decoded = is_compressed(source) and target == "vmdk"
    result = by_reference(image, path, source_format=source[0], zero_copy="auto" if decoded else "require")
    payload = vmconv.plan(str(image), str(any_dir / "x.raw"), source_format=source[0], backend="copy").totals
    assert result.totals.shared == 0
    assert result.totals.copied == (payload.copied if decoded else 0)
    assert result.totals.referenced == (0 if decoded else payload.shared + payload.copied)
    assert state(image.parent) == before
    assert path.stat().st_size < 4096 if target == "vmdk" else path.stat().st_blocks * 512 < 64 << 10
    qemu_img("compare", "-f", "raw", "-F", target, raw, path)
    if target == "qcow2":
        qemu_img("check", path)
    assert vmconv.compare(str(raw), str(path))
    report = vmconv.check(str(path))
    assert report is not None
    assert (report.corruptions, report.doubts) == ((), ())
    qemu_img("compare", "-f", "raw", "-F", QEMU_NAMES.get(source[0], source[0]), raw, image)


@pytest.mark.parametrize("target", ["vmdk", "qcow2"])
def test_a_reference_converts_like_any_image_and_shares_the_blocks_of_its_source(
    reflink_dir: Path, qemu_img: QemuImg, target: str
) -> None:
    make_disk(reflink_dir / "disk.raw", SIZE)
    vhdx, path, final = (reflink_dir / name for name in ("disk.vhdx", f"by.{target}", "final.qcow2"))
    vmconv.convert(str(reflink_dir / "disk.raw"), str(vhdx))
    by_reference(vhdx, path)
    result = vmconv.convert(str(path), str(final), zero_copy="require")
    assert result.totals.shared > 0
    assert vmconv.prove(str(vhdx), str(final))
    qemu_img("compare", reflink_dir / "disk.raw", final)
    # What was made of it depends on it no more.
    path.unlink()
    assert vmconv.compare(str(vhdx), str(final))


def test_a_chain_of_files_is_referred_to_file_by_file(any_dir: Path, qemu_img: QemuImg) -> None:
    make_disk(any_dir / "base.raw", SIZE)
    top, vmdk, overlay = (any_dir / name for name in ("top.qcow2", "new.vmdk", "new.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", top)
    scribble(top, SIZE, 1)
    by_reference(top, vmdk, zero_copy="require")
    by_reference(top, overlay, zero_copy="require")
    for path in (vmdk, overlay):
        qemu_img("compare", top, path)
        listed = {one["filename"] for one in vmconv.info(str(path))["references"]}
        assert {"base.raw", "top.qcow2"} <= listed
        assert not vmconv.check(str(path)).corruptions  # type: ignore[union-attr]
    os.utime(any_dir / "base.raw")
    for path in (vmdk, overlay):
        assert "base.raw has changed" in vmconv.check(str(path)).corruptions[0]  # type: ignore[union-attr]


def test_input_and_output_follow_the_metadata(ext4_dir: Path) -> None:
    for size in (8 * MIB, 128 * MIB):
        raw = ext4_dir / f"{size}.raw"
        raw.write_bytes(os.urandom(size))
        before = process_io()
        by_reference(raw, ext4_dir / f"{size}.vmdk")
        after = process_io()
        assert after["wchar"] - before["wchar"] < 4096
        assert after["rchar"] - before["rchar"] < 300 << 10


BY_LIBVMDK = """
import pyvmdk, sys
handle = pyvmdk.handle()
handle.open(sys.argv[1])
handle.open_extent_data_files()
left = handle.media_size
while left:
    left -= sys.stdout.buffer.write(handle.read_buffer(min(left, 1 << 20)))
"""
BY_DISSECT = """
import sys
from dissect.hypervisor.disk.vmdk import VMDK
disk = VMDK(sys.argv[1])
sys.stdout.buffer.write(disk.read(disk.size))
"""


@pytest.mark.parametrize(
    ("python", "code"), [("/usr/bin/python3", BY_LIBVMDK), (sys.executable, BY_DISSECT)], ids=["libvmdk", "dissect"]
)
def test_references_to_a_disk_that_is_a_file_are_read_by_others_too(tmp_path: Path, python: str, code: str) -> None:
    """Both ignore where in its file an extent begins, so for them it has to be the first byte."""
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    vmconv.convert(str(raw), str(tmp_path / "disk.vhd"), options={"subformat": "fixed"})
    for source in ("disk.raw", "disk.vhd"):
        path = tmp_path / f"{source}.vmdk"
        by_reference(tmp_path / source, path)
        done = subprocess.run([python, "-c", code, str(path)], capture_output=True, check=False)
        if b"No module named" in done.stderr:
            missing("oracle", done.stderr.decode().splitlines()[-1])
        assert done.stdout == raw.read_bytes(), done.stderr


def real_images() -> list[dict[str, str]]:
    """Returns the corpus' images of installed formats that are one file, and that can be read at all."""
    files = [row for row in ROWS if len(row["expect"]) == 64 and row["format"] != "parallels-bundle"]
    return [row for row in files if row["format"].split("-")[0] in installed().formats]


@pytest.mark.parametrize("target", ["vmdk", "qcow2"])
@pytest.mark.parametrize("row", real_images(), ids=lambda row: row["name"])
def test_qemu_reads_references_to_real_images_as_their_manifest_says(
    corpus: Path, ext4_dir: Path, qemu_img: QemuImg, row: dict[str, str], target: str
) -> None:
    """QEMU does not read all of these images rightly; what vmconv lets it read by reference, it must."""
    source, path = unpack(corpus, row["name"], ext4_dir), ext4_dir / f"by.{target}"
    try:
        by_reference(source, path, source_format=row["format"].split("-")[0])
    except PlanError as exc:
        assert target == "qcow2", exc
        assert "cannot be a backing file: QEMU" in str(exc)
        return
    qemu_img("convert", "-f", target, "-O", "raw", path, ext4_dir / "read.raw")
    assert digest(ext4_dir / "read.raw", "raw") == row["expect"]


# -- what cannot be referred to


def test_partial_sectors_are_copied_with_the_reason(any_dir: Path, qemu_img: QemuImg) -> None:
    raw, path = any_dir / "disk.raw", any_dir / "disk.vmdk"
    raw.write_bytes(os.urandom(MIB + 100))
    result = by_reference(raw, path)
    assert (result.totals.referenced, result.totals.copied) == (MIB, 100)
    assert result.copies[0].reason == "an extent of a VMDK is whole sectors of 512 bytes, in its file as in the disk"
    assert (any_dir / "disk-rest.vmdk").stat().st_size == MIB + 512
    qemu_img("compare", "-f", "raw", "-F", "vmdk", raw, path)
    by_reference(raw, any_dir / "disk.qcow2", zero_copy="require")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, any_dir / "disk.qcow2")
    with pytest.raises(ZeroCopyError, match="100 bytes would have to be copied"):
        by_reference(raw, path, zero_copy="require", force=True)


def test_compressed_clusters_are_placed_in_the_rest(any_dir: Path, qemu_img: QemuImg) -> None:
    raw, image, path = (any_dir / name for name in ("disk.raw", "disk.qcow2", "disk.vmdk"))
    raw.write_bytes(b"some text that compresses" * 40000 + bytes(-25 * 40000 % 512))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
    qemu_io(image, "write -q -P 9 128k 256k")
    result = by_reference(image, path)
    assert result.totals.referenced == 256 << 10
    assert "decompressed" in result.copies[0].reason
    qemu_img("compare", "-f", "qcow2", "-F", "vmdk", image, path)
    assert vmconv.compare(str(image), str(path))


def scattered(path: Path, pieces: int, qemu_img: QemuImg) -> Path:
    """Makes a qcow2 image of `pieces` clusters; no two neighbours are adjacent in the file."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", path, f"{pieces * 4}K")
    order = [*range(0, pieces, 2), *range(1, pieces, 2)]
    qemu_io(path, *(f"write -q -P {number % 254 + 1} {number * 4}k 4k" for number in order))
    return path


def test_a_disk_in_too_many_pieces_is_refused_with_what_to_do(tmp_path: Path, qemu_img: QemuImg) -> None:
    most, more = (scattered(tmp_path / f"{n}.qcow2", n, qemu_img) for n in (512, 514))
    with pytest.raises(PlanError, match="514 ranges of its files, QEMU opens 512 extents at most") as caught:
        by_reference(more, tmp_path / "more.vmdk")
    assert "qcow2 image with subformat=reference" in str(caught.value.hint)
    by_reference(more, tmp_path / "overlay.qcow2")
    qemu_img("compare", more, tmp_path / "overlay.qcow2")
    # As many as are allowed are no problem for a QEMU with as many files as processes usually have.
    by_reference(most, tmp_path / "most.vmdk")
    assert (tmp_path / "most.vmdk").read_text().count("FLAT") == 512
    subprocess.run(
        ["qemu-img", "compare", "-F", "vmdk", str(most), str(tmp_path / "most.vmdk")],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)),
        capture_output=True,
    )


def test_a_sparse_file_is_one_extent_however_many_holes_it_has(ext4_dir: Path, qemu_img: QemuImg) -> None:
    raw, path = ext4_dir / "disk.raw", ext4_dir / "disk.vmdk"
    with raw.open("wb") as file:
        file.truncate(600 * 65536)
        for number in range(1, 599, 2):
            file.seek(number * 65536)
            file.write(random.Random(number).randbytes(4096))
    by_reference(raw, path)
    assert path.read_text().count("FLAT") == 1
    qemu_img("compare", "-f", "raw", "-F", "vmdk", raw, path)


def test_a_disk_of_nothing_but_zeros(any_dir: Path, qemu_img: QemuImg) -> None:
    raw = any_dir / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    for target in ("vmdk", "qcow2"):
        assert by_reference(raw, any_dir / f"new.{target}").totals.referenced == 0
        qemu_img("compare", "-f", "raw", "-F", target, raw, any_dir / f"new.{target}")


def test_a_block_device_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    content = make_disk(tmp_path / "device.raw", MIB)
    attach = ["losetup", "--find", "--show", "--read-only", str(content)]
    device = subprocess.run(attach, capture_output=True, text=True, check=True).stdout.strip()
    try:
        for target in ("vmdk", "qcow2"):
            with pytest.raises(PlanError, match="is a block device: later changes could not be detected"):
                by_reference(Path(device), tmp_path / f"new.{target}", source_format="raw")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize(
    ("make_source", "why"),
    [
        ("-f vhdx", None),
        ("-f vpc", None),
        ("-f vpc creator", "takes the geometry"),
        ("-f vdi block", "blocks of 1048576 bytes"),
        ("-f vmdk zero", "kind ZERO"),
        ("-f qcow2 data", "working directory"),
    ],
)
def test_a_file_that_qemu_reads_differently_is_no_backing_file(
    tmp_path: Path, qemu_img: QemuImg, make_source: str, why: str | None
) -> None:
    kind, *what = make_source.split()[1:]
    path = tmp_path / "source.img"
    if what == ["data"]:
        (tmp_path / "disk.raw").write_bytes(os.urandom(MIB))
        vmconv.convert(str(tmp_path / "disk.raw"), str(path), target_format="qcow2", options={"data_file": "disk.raw"})
    else:
        qemu_img("create", "-q", "-f", kind, path, "8M")
    data = bytearray(path.read_bytes())
    if what == ["creator"]:
        for footer in (0, len(data) - 512):
            data[footer + 28 : footer + 32] = b"vbox"
            data[footer + 48 : footer + 56] = (8 * MIB).to_bytes(8, "big")
            data[footer + 64 : footer + 68] = bytes(4)
            total = ~sum(data[footer : footer + 512]) & 0xFFFFFFFF
            data[footer + 64 : footer + 68] = total.to_bytes(4, "big")
    if what == ["block"]:
        data[376:380] = (2 * MIB).to_bytes(4, "little")
        data[384:388] = (4).to_bytes(4, "little")
    if what == ["zero"]:
        data = bytearray(
            b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 2048 ZERO\n'
        )
    path.write_bytes(data)
    formats: dict[str, Any] = {"source_format": {"vpc": "vhd"}.get(kind, kind)}
    if why is None:
        by_reference(path, tmp_path / "new.qcow2", **formats)
        return
    with pytest.raises(PlanError, match=why) as caught:
        by_reference(path, tmp_path / "new.qcow2", **formats)
    assert "subformat=reference" in str(caught.value.hint)
    assert not (tmp_path / "new.qcow2").exists()


def test_a_backing_file_or_a_snapshot_is_another_request(tmp_path: Path, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "1M")
    qemu_img("snapshot", "-c", "one", tmp_path / "disk.qcow2")
    for option, asked in (
        ("-B", {"backing_file": "x"}),
        ("--snapshot", {"snapshot": "one"}),
        ("--chain", {"chain": True}),
    ):
        with pytest.raises(UsageError, match=f"{option}: the target's backing file would be the unchanged source"):
            by_reference(tmp_path / "disk.qcow2", tmp_path / "new.qcow2", **asked)
    with pytest.raises(PlanError, match="reference cannot have a backing file"):
        qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
        by_reference(tmp_path / "top.qcow2", tmp_path / "new.vmdk", backing_file="disk.qcow2")


# -- names


@pytest.mark.parametrize("target", ["vmdk", "qcow2"])
@pytest.mark.parametrize(
    ("source", "folder", "written"),
    [
        ("disk.raw", ".", "disk.raw"),
        ("below/disk.raw", ".", "below/disk.raw"),
        ("with: colon.raw", ".", "./with: colon.raw"),
        ("nbd:disk.raw", ".", "./nbd:disk.raw"),
        ("spaces \N{GREEK SMALL LETTER OMEGA}.raw", ".", "spaces \N{GREEK SMALL LETTER OMEGA}.raw"),
        (os.fsdecode(b"no text \xff.raw"), ".", os.fsdecode(b"no text \xff.raw")),
        ("disk.raw", "beside", None),
    ],
)
def test_names_are_relative_where_the_source_is_in_or_below_the_directory(
    tmp_path: Path,
    qemu_img: QemuImg,
    capsys: pytest.CaptureFixture[str],
    source: str,
    folder: str,
    written: str | None,
    target: str,
) -> None:
    raw, path = tmp_path / source, tmp_path / folder / f"new.{target}"
    for one in (raw, path):
        one.parent.mkdir(exist_ok=True)
    make_disk(raw, MIB)
    assert main(["convert", "-o", "subformat=reference", str(raw), str(path)]) == 0
    noted = capsys.readouterr().err
    (reference,) = (one for one in vmconv.info(str(path))["references"] if "rest" not in one["filename"])
    assert reference["filename"] == (written or str(raw))
    # Wherever QEMU is started, it finds the file; so it does when all is moved, if the name is relative.
    qemu_img("compare", "-f", "raw", "-F", target, f"file:{raw}", path)
    if written:
        assert "--allow-external" not in noted
        shutil.copytree(tmp_path, tmp_path / "moved")
        raw.unlink()
        assert vmconv.compare(str(tmp_path / "moved" / source), str(tmp_path / "moved" / f"new.{target}"))
        return
    assert f"note: {raw} is outside the target's directory" in noted
    with pytest.raises(AccessError, match="outside the image's directory"):
        vmconv.compare(str(raw), str(path))
    assert vmconv.compare(str(raw), str(path), allow_external=[str(tmp_path)])
    assert vmconv.check(str(path), allow_external=[str(tmp_path)]).corruptions == ()  # type: ignore[union-attr]
    # What may not be looked at keeps nobody from seeing what the image says.
    assert "outside the image's directory" in vmconv.info(str(path))["warnings"][0]


@pytest.mark.parametrize("name", ['quo"te.raw', "new\nline.raw", "form\x0cfeed.raw"])
def test_a_name_that_a_descriptor_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    make_disk(tmp_path / name, MIB)
    with pytest.raises(PlanError, match="descriptor cannot hold the file name"):
        by_reference(tmp_path / name, tmp_path / "new.vmdk")
    assert by_reference(tmp_path / name, tmp_path / "new.qcow2").totals.referenced > 0
    assert vmconv.compare(str(tmp_path / name), str(tmp_path / "new.qcow2"))


def test_a_symbolic_link_is_followed_once_and_for_all(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    make_disk(tmp_path / "real" / "disk.raw", MIB)
    (tmp_path / "link.raw").symlink_to("real/disk.raw")
    by_reference(tmp_path / "link.raw", tmp_path / "new.vmdk")
    assert vmconv.info(str(tmp_path / "new.vmdk"))["references"][0]["filename"] == "real/disk.raw"


# -- writing to it


def test_qemu_refuses_to_write_into_the_payload_of_a_container(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    (tmp_path / "dense.raw").write_bytes(os.urandom(2 * MIB))
    for source in ("disk.raw", "dense.raw"):
        container, path = tmp_path / f"{source}.vhdx", tmp_path / f"{source}.vmdk"
        vmconv.convert(str(tmp_path / source), str(container))
        by_reference(container, path)
        done = subprocess.run(["qemu-io", "-c", "write 0 512", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode, done.stdout
        assert "lock" in done.stderr
        # A layer above takes what is written.
        qemu_img("create", "-q", "-f", "qcow2", "-b", path.name, "-F", "vmdk", tmp_path / "above.qcow2")
        qemu_io(tmp_path / "above.qcow2", "write -q -P 1 0 64k")
        assert not vmconv.check(str(path)).corruptions  # type: ignore[union-attr]
        assert vmconv.compare(str(tmp_path / source), str(container))
    assert raw.exists()


# -- a later change is noticed


def _write_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"!")


def _exchange(path: Path) -> None:
    old = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(os.urandom(old.st_size))
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    other.rename(path)


def _map_and_write(path: Path) -> None:
    import mmap

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[MIB] ^= 0xFF


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (_write_a_byte, "modified"),
    "a byte by mapping": (_map_and_write, "modified"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 512), "it has 2097664 bytes, it had 2097152"),
    "shorter": (lambda path: os.truncate(path, MIB), "has 1048576 bytes, 2097152 are referred to"),
    "exchanged": (_exchange, "first or last 64 KiB differ"),
    "touched": (os.utime, "modified"),
    "gone": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("target", ["vmdk", "qcow2"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_source_is_noticed(
    any_dir: Path, capsys: pytest.CaptureFixture[str], change: str, target: str
) -> None:
    raw, path = any_dir / "disk.raw", any_dir / f"new.{target}"
    raw.write_bytes(os.urandom(2 * MIB))
    by_reference(raw, path)
    assert main(["check", str(path)]) == 0
    do, said = CHANGES[change]
    do(raw)
    capsys.readouterr()
    assert main(["check", str(path)]) == 2
    assert said in capsys.readouterr().out
    assert said in " ".join(vmconv.info(str(path))["warnings"])
    if change in ("gone", "shorter"):
        return
    result = vmconv.convert(str(path), str(any_dir / "copy.raw"))
    assert said in " ".join(result.warnings)


@pytest.mark.parametrize("target", ["vmdk", "qcow2"])
def test_a_change_in_the_very_next_moment_is_noticed(any_dir: Path, target: str) -> None:
    raw, path = any_dir / "disk.raw", any_dir / f"new.{target}"
    for number in range(5):
        raw.write_bytes(os.urandom(MIB))
        by_reference(raw, path, force=True)
        _write_a_byte(raw)
        assert vmconv.check(str(path)).corruptions, number  # type: ignore[union-attr]


def test_a_reference_is_made_when_the_clock_of_files_has_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file that was written a moment before could be written again without getting another time."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    with Opener(installed()) as opener:
        file = opener.image(str(path)).file
        settle([file])
        assert time.time_ns() - file.stamp.ctime >= 20_000_000
        waited: list[float] = []
        monkeypatch.setattr("vmconv.model.references.time.sleep", waited.append)
        settle([file])
        assert not waited


@pytest.mark.parametrize("target", ["vmdk", "qcow2"])
def test_a_possible_change_is_a_doubt(any_dir: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    raw, path = any_dir / "disk.raw", any_dir / f"new.{target}"
    make_disk(raw, MIB)
    by_reference(raw, path)
    raw.chmod(0o600)
    assert main(["check", str(path)]) == 0
    assert "was copied, renamed or had its attributes changed since" in capsys.readouterr().out
    assert "had its attributes changed" in vmconv.info(str(path))["warnings"][0]
    # The same for who copies all with its times.
    copy = any_dir / "copy"
    files = [str(file) for file in any_dir.iterdir()]
    copy.mkdir()
    subprocess.run(["cp", "-a", *files, str(copy)], check=True)
    assert main(["check", str(copy / path.name)]) == 0


def test_a_rebased_overlay_ignores_its_old_parent(tmp_path: Path, qemu_img: QemuImg) -> None:
    for name in ("one.raw", "two.raw"):
        make_disk(tmp_path / name, MIB)
    path = tmp_path / "new.qcow2"
    by_reference(tmp_path / "one.raw", path)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "two.raw", path)
    _write_a_byte(tmp_path / "one.raw")
    assert vmconv.check(str(path)).corruptions == ()  # type: ignore[union-attr]
    assert "references" not in vmconv.info(str(path))


def test_qemu_keeps_the_records_of_an_overlay_that_it_writes_to(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw, path = make_disk(tmp_path / "disk.raw", MIB), tmp_path / "new.qcow2"
    by_reference(raw, path)
    qemu_io(path, "write -q -P 3 0 64k")
    qemu_img("resize", "-q", path, "2M")
    assert vmconv.check(str(path)).corruptions == ()  # type: ignore[union-attr]
    _write_a_byte(raw)
    assert "disk.raw has changed" in vmconv.check(str(path)).corruptions[0]  # type: ignore[union-attr]


# -- a data file


@pytest.mark.parametrize(
    "options", [{}, {"data_file_raw": "on"}, {"extended_l2": "on"}, {"cluster_size": "2M"}], ids=str
)
def test_a_raw_source_becomes_the_data_file_as_it_is(any_dir: Path, qemu_img: QemuImg, options: dict[str, str]) -> None:
    raw, path = make_disk(any_dir / "disk.raw", SIZE + 512), any_dir / "new.qcow2"
    content, before = raw.read_bytes(), raw.stat()
    result = vmconv.convert(str(raw), str(path), options={"data_file": str(raw), **options}, zero_copy="require")
    after = raw.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert raw.read_bytes() == content
    assert result.totals.referenced > 0
    assert path.stat().st_blocks * 512 < 4 * MIB
    qemu_img("check", path)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)
    assert vmconv.compare(str(raw), str(path))
    data = vmconv.info(str(path))["format-specific"]["data"]
    assert (data["data-file"], data["data-file-raw"]) == (str(raw), "data_file_raw" in options)
    # Guests write into it, into what was there and into what was a hole.
    qemu_io(path, "write -q -P 5 0 100k", f"write -q -P 6 {SIZE - 8192} 8k", f"write -z -q {4 * MIB} 1M")
    qemu_img("check", path)
    if "data_file_raw" in options:
        qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)
    assert raw.read_bytes()[: 100 << 10] == b"\5" * (100 << 10)
    assert vmconv.check(str(path)).corruptions == ()  # type: ignore[union-attr]


def test_a_name_that_is_not_the_source_is_no_data_file(tmp_path: Path) -> None:
    raw, other, path = tmp_path / "disk.raw", tmp_path / "other.raw", tmp_path / "new.qcow2"
    make_disk(raw, MIB)
    make_disk(other, MIB, seed=3)
    content = other.read_bytes()
    for name, said in (("other.raw", "is not .*disk.raw"), ("none.raw", "No such file")):
        with pytest.raises(PlanError, match=said) as caught:
            vmconv.convert(str(raw), str(path), options={"data_file": name})
        assert "relative to the target's directory" in str(caught.value.hint)
    assert other.read_bytes() == content
    assert not path.exists()


def test_a_confined_conversion_does_not_tell_what_lies_elsewhere(tmp_path: Path) -> None:
    """An operator of a datastore could ask for one name after the other."""
    tree = tmp_path / "tree"
    tree.mkdir()
    make_disk(tree / "disk.raw", MIB)
    (tmp_path / "there").write_bytes(b"")
    (tree / "link").symlink_to(tmp_path)
    for name in (str(tmp_path / "there"), str(tmp_path / "none"), "../there", "../none", "link/there", "link/none"):
        with pytest.raises(AccessError, match=f"^{re.escape(name)}: lies outside of the directories") as caught:
            vmconv.convert(
                str(tree / "disk.raw"),
                str(tree / "new.qcow2"),
                options={"data_file": name},
                allow_external=[str(tree)],
                confined=True,
            )
        assert "No such file" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "options"), [("vhd", {"subformat": "fixed"}), ("vhdx", {}), ("qcow2", {})])
def test_a_file_that_is_not_the_disk_and_nothing_else_is_no_data_file(
    tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    image = tmp_path / f"disk.{suffix}"
    vmconv.convert(str(tmp_path / "disk.raw"), str(image), options=options)
    with pytest.raises(PlanError, match=r"is not the disk|512 bytes lie behind the disk") as caught:
        vmconv.convert(str(image), str(tmp_path / "new.qcow2"), options={"data_file": image.name})
    assert "convert to raw first" in str(caught.value.hint)


# -- the text of records


@given(
    name=st.text(st.characters(exclude_characters="\0"), min_size=1),
    numbers=st.tuples(st.integers(0, 1 << 62), *[st.integers(-(1 << 62), 1 << 62)] * 2),
    digest=st.binary(min_size=16, max_size=16),
)
def test_a_record_is_read_as_it_was_written(name: str, numbers: tuple[int, int, int], digest: bytes) -> None:
    record = Record(name, Fingerprint(*numbers, digest.hex()))
    assert read_records([str(record)]) == {name: record.fingerprint}


@given(st.lists(st.text(), max_size=5))
def test_invalid_records_are_left_out(texts: list[str]) -> None:
    assert read_records(texts) == {}


def test_flat_disks_of_others_are_checked_for_their_files(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "8M")
    assert main(["check", str(path)]) == 0
    os.truncate(tmp_path / "disk-flat.vmdk", MIB)
    assert vmconv.check(str(path)).corruptions == (  # type: ignore[union-attr]
        "extent disk-flat.vmdk has 1048576 bytes, 8388608 are referred to",
    )
    (tmp_path / "disk-flat.vmdk").unlink()
    assert vmconv.check(str(path)).corruptions == ("extent disk-flat.vmdk is missing",)  # type: ignore[union-attr]


def test_untrusted_records_open_no_outside_file_and_block_no_command(tmp_path: Path) -> None:
    """What the records of an image name is looked at under the same rules as all that images name."""
    folder = tmp_path / "images"
    folder.mkdir()
    raw, path = make_disk(folder / "disk.raw", MIB), folder / "new.qcow2"
    make_disk(tmp_path / "outside.raw", MIB)
    numbers = "1048576 0 0 " + "0" * 32
    names = {
        "../outside.raw": "outside the image's directory",
        "/proc/self/environ": "outside the image's directory",
        "nbd:disk": "is not a plain file name",
        "new.qcow2": "is the image itself",
        "none.raw": "is missing",
        "": "",
        **{f"{number}.raw": "is missing" for number in range(3000)},
    }
    text = "\0".join(f"vmconv-1 {name} {numbers}" for name in ["disk.raw", *names])
    extensions = extension(BACKING_FORMAT, b"raw") + extension(structs.RECORDS, text.encode())
    path.write_bytes(image(l1=[0], l2=[0], payload=b"", backing="disk.raw", extensions=extensions, cluster_bits=18))
    said = " ".join(vmconv.info(str(path))["warnings"])
    assert all(problem in said for problem in names.values())
    assert vmconv.convert(str(path), str(folder / "copy.raw")).target
    assert vmconv.compare(str(raw), str(folder / "copy.raw"))
    report = vmconv.check(str(path))
    assert report is not None
    assert any("outside the image's directory" in text for text in report.errors)
    assert main(["check", str(path)]) == 1


def test_the_plan_lists_the_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    assert main(["plan", "-o", "subformat=reference", str(raw), str(tmp_path / "new.vmdk")]) == 0
    out = capsys.readouterr().out
    assert "(vmdk) by reference" in out
    assert "refers to disk.raw: " in out
    assert sorted(os.listdir(tmp_path)) == ["disk.raw"]


def test_only_formats_that_say_so_have_the_source_as_backing_file() -> None:
    keepers = {
        name
        for name, one in installed().formats.items()
        if one.keeps_source(one.options()(**({"subformat": "reference"} if name == "qcow2" else {})))
    }
    assert keepers == {"qcow2"}


@pytest.mark.parametrize("variant", [("vmdk", "subformat=streamOptimized"), ("vmdk", "subformat=monolithicSparse")])
def test_the_access_in_an_embedded_descriptor_makes_no_difference(
    xfs_dir: Path, qemu_img: QemuImg, variant: Variant
) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    vmdk, top = make(raw, variant, xfs_dir), xfs_dir / "top.qcow2"
    data = vmdk.read_bytes()
    at = data.index(b"\nRW ")
    end = data.index(b"\0", at)
    said = data[at:end].replace(b"\nRW ", b"\nRDONLY ", 1)
    vmdk.write_bytes(data[:at] + said + data[at + len(said) :])
    access: dict[str, Any] = {"allow_external": [str(xfs_dir)]}
    vmconv.convert(str(vmdk), str(top), options={"subformat": "reference"}, **access)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, top)
    assert vmconv.compare(str(raw), str(top), **access)


@pytest.mark.parametrize("line", ['RDONLY {} FLAT "disk.raw" 0', "RW {} ZERO"])
def test_the_lines_of_a_separate_descriptor_do(xfs_dir: Path, line: str) -> None:
    make_disk(xfs_dir / "disk.raw", SIZE)
    text = f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="twoGbMaxExtentFlat"\n{line}\n'
    (xfs_dir / "disk.vmdk").write_text(text.format(SIZE // 512))
    with pytest.raises(PlanError, match="cannot be a backing file: QEMU"):
        vmconv.convert(str(xfs_dir / "disk.vmdk"), str(xfs_dir / "top.qcow2"), options={"subformat": "reference"})
