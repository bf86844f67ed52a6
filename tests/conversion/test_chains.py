"""Chain to chain: each layer of a chain becomes a layer in the target format, which the registry gives."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io, scribble
from support.parallels_images import bundle
from support.requirements import missing
from vmconv.cli import main as cli
from vmconv.errors import BackendError, PlanError, UsageError, VerifyError, VmconvError, ZeroCopyError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Layout

SIZE = 12 * MIB
CLUSTER = 65536
# QEMU 7.2 refuses differencing VHDX and VDI, and opens a differencing VHD as if it stood alone.
OPENED_BY_QEMU = ("qcow2", "qed", "vmdk")
# Where a format can leave less than a block to the parent, that much; else its blocks.
GRANULARITY = {"vhd": 512, "vhdx": 512}


def formats() -> list[str]:
    """Returns the formats that can have a parent and are read and written."""
    found = installed().formats.items()
    return sorted(name for name, one in found if one.supports_backing and one.can_read and one.can_write)


def suffix(name: str) -> str:
    return installed().formats[name].suffixes[0]


def layers(top: Path, format_name: str | None = None) -> Iterator[Image]:
    """Yields the layers of a chain, the top first, while its files are open."""
    with Opener(installed()) as opener:
        yield from opener.image(str(top), format_name).chain()


def overlay(qemu_img: QemuImg, path: Path, below: Path, format_name: str, seed: int) -> Path:
    """Returns a new qcow2 or VMDK image on top of another one, with some differences."""
    kind = "vmdk" if path.suffix == ".vmdk" else "qcow2"
    qemu_img("create", "-f", kind, "-b", below.name, "-F", format_name, path)
    scribble(path, SIZE, seed, count=6, unit=CLUSTER)
    return path


def qcow2_chain(directory: Path, qemu_img: QemuImg) -> Path:
    """Three qcow2 images, with discarded and zeroed ranges that hide what is below."""
    base = directory / "base.qcow2"
    qemu_img("convert", "-O", "qcow2", make_disk(directory / "disk.raw", SIZE, unit=CLUSTER), base)
    middle = overlay(qemu_img, directory / "middle.qcow2", base, "qcow2", 1)
    top = overlay(qemu_img, directory / "top.qcow2", middle, "qcow2", 2)
    qemu_io(top, "write -z 3M 2M")
    return top


def vmdk_chain(directory: Path, qemu_img: QemuImg) -> Path:
    """A VMDK delta on a sparse one on a flat one."""
    base = directory / "base.vmdk"
    raw = make_disk(directory / "disk.raw", SIZE, unit=CLUSTER)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, base)
    middle = overlay(qemu_img, directory / "middle.vmdk", base, "vmdk", 3)
    return overlay(qemu_img, directory / "top.vmdk", middle, "vmdk", 4)


def mixed_chain(directory: Path, qemu_img: QemuImg) -> Path:
    """A qcow2 overlay on a VMDK."""
    base = directory / "base.vmdk"
    qemu_img("convert", "-O", "vmdk", make_disk(directory / "disk.raw", SIZE, unit=CLUSTER), base)
    return overlay(qemu_img, directory / "top.qcow2", base, "vmdk", 5)


SOURCES = {"qcow2": qcow2_chain, "vmdk": vmdk_chain, "qcow2 on vmdk": mixed_chain}


def to_chain(source: Path, directory: Path, format_name: str, **request: Any) -> Path:
    """Converts a chain without copying and returns the top of the new one."""
    directory.mkdir()
    target = directory / f"top{suffix(format_name)}"
    result = vmconv.convert(
        str(source), str(target), target_format=format_name, chain=True, zero_copy="require", **request
    )
    assert result.totals.copied == 0
    assert result.totals.shared > 0
    assert len(os.listdir(directory)) == len(result.layers) + 1
    return target


def silent(image: Image, unit: int) -> npt.NDArray[np.bool_]:
    """Returns which units of the disk the layer leaves to its parent as a whole; in a base, which hold no data."""
    table = (image.guest if image.parent else image.flat).window(0, -(-image.size // unit) * unit)
    starts = np.arange(0, table.size, unit, dtype=np.int64)
    first, last = table.row_at(starts), table.row_at(starts + unit - 1)
    speaks = table.kind != Kind.HOLE if image.parent else table.kind == Kind.DATA
    before = np.concatenate([[0], np.cumsum(speaks)])
    found: npt.NDArray[np.bool_] = before[last + 1] == before[first]
    return found


def assert_same_layers(source: Path, target: Path) -> None:
    """Every layer is there, shows a guest the same, and says something only where it did."""
    for was, now in zip(layers(source), layers(target), strict=True):
        unit = GRANULARITY.get(now.format_name) if now.parent else None
        unit = unit or now.details["cluster-size"]
        assert np.array_equal(silent(was, unit), silent(now, unit)), (now.file.name, unit)
        assert vmconv.compare(was.file.path, now.file.path), now.file.name


@pytest.mark.parametrize("target", formats())
@pytest.mark.parametrize("source", SOURCES)
def test_a_chain_becomes_a_chain_without_copying(
    reflink_dir: Path, qemu_img: QemuImg, source: str, target: str
) -> None:
    top = SOURCES[source](reflink_dir, qemu_img)
    new = to_chain(top, reflink_dir / "new", target)
    assert_same_layers(top, new)
    assert {layer.format_name for layer in layers(new)} == {target}
    assert vmconv.prove(str(top), str(new))
    if target in OPENED_BY_QEMU:
        for image in new.parent.iterdir():
            qemu_img("check", "-f", target, image, ok=(0, 63))
        qemu_img("compare", "-f", top.suffix[1:], "-F", target, top, new)


@pytest.mark.parametrize("source", formats())
def test_chains_convert_to_each_other_and_flatten_by_reference(
    reflink_dir: Path, qemu_img: QemuImg, source: str
) -> None:
    original = qcow2_chain(reflink_dir, qemu_img)
    top = to_chain(original, reflink_dir / "source", source)
    flat = reflink_dir / "flat.raw"
    assert vmconv.convert(str(top), str(flat), zero_copy="require").totals.copied == 0
    assert vmconv.prove(str(top), str(flat))
    qemu_img("compare", "-f", "qcow2", "-F", "raw", original, flat)
    for target in formats():
        new = to_chain(top, reflink_dir / target, target)
        assert_same_layers(top, new)
        assert vmconv.compare(str(flat), str(new))


@pytest.mark.parametrize("source", SOURCES)
def test_chains_of_qemu_are_flattened_by_reference(reflink_dir: Path, qemu_img: QemuImg, source: str) -> None:
    top = SOURCES[source](reflink_dir, qemu_img)
    flat = reflink_dir / "flat.raw"
    assert vmconv.convert(str(top), str(flat), zero_copy="require").totals.copied == 0
    qemu_img("compare", "-f", top.suffix[1:], "-F", "raw", top, flat)


# Layers that do not fit the target's blocks, and layers of different sizes


@pytest.mark.parametrize("target", formats())
@pytest.mark.parametrize(("unit", "cluster"), [(4096, "4K"), (512, "512")])
def test_parts_of_a_block_are_filled_from_the_parent(
    reflink_dir: Path, qemu_img: QemuImg, target: str, unit: int, cluster: str
) -> None:
    raw = make_disk(reflink_dir / "base.raw", SIZE)
    below, below_format = raw, "raw"
    for seed in range(2):
        path = reflink_dir / f"{seed}.qcow2"
        qemu_img("create", "-f", "qcow2", "-o", f"cluster_size={cluster}", "-b", below.name, "-F", below_format, path)
        scribble(path, SIZE, seed, count=15, unit=unit)
        below, below_format = path, "qcow2"
    directory = reflink_dir / "new"
    directory.mkdir()
    top = directory / f"top{suffix(target)}"
    result = vmconv.convert(
        str(below), str(top), target_format=target, chain=True, zero_copy="require" if unit == 4096 else "auto"
    )
    assert bool(result.totals.copied) == (unit == 512)
    for was, now in zip(layers(below), layers(top), strict=True):
        assert vmconv.compare(was.file.path, now.file.path), now.file.name
    qemu_img("compare", "-f", "qcow2", "-F", "raw", below, flattened(top, reflink_dir / "flat.raw"))
    if target in OPENED_BY_QEMU:
        qemu_img("compare", "-f", "qcow2", "-F", target, below, top)


def flattened(top: Path, flat: Path) -> Path:
    vmconv.convert(str(top), str(flat))
    return flat


@pytest.mark.parametrize("target", formats())
@pytest.mark.parametrize("size", [SIZE - 3 * MIB + 512, SIZE + 3 * MIB + 512])
def test_layers_of_different_sizes_are_converted_or_refused(
    reflink_dir: Path, qemu_img: QemuImg, target: str, size: int
) -> None:
    base, top = make_disk(reflink_dir / "base.raw", SIZE), reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "raw", top, str(size))
    scribble(top, size, 1, unit=CLUSTER)
    new = reflink_dir / "new" / f"top{suffix(target)}"
    new.parent.mkdir()
    if target in ("vmdk", "vhd", "vdi"):
        with pytest.raises(PlanError, match=rf"as large as its parent: {size} bytes, base.* has {SIZE}"):
            vmconv.convert(str(top), str(new), target_format=target, chain=True)
        assert not list(new.parent.iterdir())
        return
    vmconv.convert(str(top), str(new), target_format=target, chain=True)
    assert [layer.size for layer in layers(new)] == [size, SIZE]
    assert vmconv.compare(str(top), str(new), strict=True)
    if target in OPENED_BY_QEMU:
        qemu_img("compare", "-f", "qcow2", "-F", target, top, new)


# Others' readers


def test_dissect_reads_a_chain_of_vhdx(reflink_dir: Path, qemu_img: QemuImg) -> None:
    vhdx = pytest.importorskip("dissect.hypervisor.disk.vhdx")
    top = qcow2_chain(reflink_dir, qemu_img)
    wanted = flattened(top, reflink_dir / "flat.raw").read_bytes()
    disk = vhdx.VHDX(to_chain(top, reflink_dir / "new", "vhdx"))
    try:
        assert disk.parent.parent.parent is None
        assert disk.read(disk.size) == wanted
    finally:
        while disk:
            disk.fh.close()
            disk = disk.parent


def test_dissect_reads_a_chain_of_vdi(reflink_dir: Path, qemu_img: QemuImg) -> None:
    vdi = pytest.importorskip("dissect.hypervisor.disk.vdi")
    top = qcow2_chain(reflink_dir, qemu_img)
    wanted = flattened(top, reflink_dir / "flat.raw").read_bytes()
    new = to_chain(top, reflink_dir / "new", "vdi")
    with ExitStack() as stack:
        disk = None
        for image in reversed(list(layers(new))):
            disk = vdi.VDI(stack.enter_context(open(image.file.path, "rb")), disk.open() if disk else None)
        assert disk is not None
        assert b"".join(block(disk, at) for at in range(0, SIZE, MIB)) == wanted


def block(disk: Any, at: int) -> bytes:
    """Returns one block: dissect 3.21 takes what follows for more of the first when it reads several."""
    stream = disk.open()
    stream.seek(at)
    data: bytes = stream.read(MIB)
    return data


def test_libvhdi_reads_a_chain_of_vhd(reflink_dir: Path, qemu_img: QemuImg, tmp_path: Path) -> None:
    if not shutil.which("vhdimount"):
        missing("oracle", "vhdimount is not installed")
    top = qcow2_chain(reflink_dir, qemu_img)
    wanted = flattened(top, reflink_dir / "flat.raw").read_bytes()
    new = to_chain(top, reflink_dir / "new", "vhd")
    subprocess.run(["vhdimount", str(new), str(tmp_path)], check=True, capture_output=True)
    try:
        # One file for each layer, the base first.
        assert (tmp_path / "vhdi3").read_bytes() == wanted
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Names


def test_layers_are_named_after_themselves(reflink_dir: Path, qemu_img: QemuImg) -> None:
    """Two of one name get a number; an ending that speaks of no format stays."""
    first, second = reflink_dir / "a", reflink_dir / "b"
    first.mkdir()
    second.mkdir()
    raw = make_disk(first / "disk.raw", MIB)
    for path, below, kind in (
        (second / "disk.snap1", raw, "raw"),
        (second / "disk.qcow2", second / "disk.snap1", "qcow2"),
        (reflink_dir / "top.qcow2", second / "disk.qcow2", "qcow2"),
    ):
        qemu_img("create", "-f", "qcow2", "-b", os.path.relpath(below, path.parent), "-F", kind, path)
    new = reflink_dir / "new" / "any name"
    new.parent.mkdir()
    result = vmconv.convert(
        str(reflink_dir / "top.qcow2"),
        str(new),
        target_format="vmdk",
        chain=True,
        allow_external=[str(reflink_dir)],
    )
    assert result.layers == ("disk.vmdk", "disk.snap1.vmdk", "disk-2.vmdk")
    assert set(os.listdir(new.parent)) == {"any name", *result.layers}
    assert [layer.file.name for layer in layers(new, "vmdk")] == ["any name", *result.layers]


def test_layers_that_one_file_describes_are_named_as_it_names_them(reflink_dir: Path) -> None:
    path, states = bundle(reflink_dir / "disk.hdd")
    target = reflink_dir / "new.qcow2"
    result = vmconv.convert(str(path), str(target), source_format="parallels", chain=True, zero_copy="require")
    assert result.layers == ("middle.qcow2", "base.qcow2")
    for name, state in zip((*result.layers[::-1], target.name), states, strict=True):
        assert flattened(reflink_dir / name, reflink_dir / f"{name}.raw").read_bytes() == state


@pytest.fixture
def top(reflink_dir: Path, qemu_img: QemuImg) -> Path:
    """The top of a chain of three qcow2 images."""
    return qcow2_chain(reflink_dir, qemu_img)


def refused(top: Path, target: Path, error: type[VmconvError], match: str, **request: Any) -> VmconvError:
    """Converts a chain, which must fail and change nothing."""
    before = {path: path.stat().st_mtime_ns for path in (*top.parent.iterdir(), *target.parent.iterdir())}
    with pytest.raises(error, match=match) as caught:
        vmconv.convert(str(top), str(target), chain=True, **request)
    assert before == {path: path.stat().st_mtime_ns for path in (*top.parent.iterdir(), *target.parent.iterdir())}
    return caught.value


def test_a_layer_that_would_replace_its_own_source_is_refused_even_by_force(top: Path) -> None:
    error = refused(top, top.with_name("new.qcow2"), PlanError, r"base\.qcow2: is part of the source", force=True)
    assert "another directory" in str(error.hint) or "directory" in str(error.hint)


def test_an_existing_file_is_replaced_by_force_only(top: Path) -> None:
    target = top.with_name("new.vmdk")
    old = top.with_name("middle.vmdk")
    old.write_bytes(b"old")
    refused(top, target, PlanError, r"middle\.vmdk: already exists")
    assert vmconv.convert(str(top), str(target), chain=True, force=True).layers == ("middle.vmdk", "base.vmdk")
    assert_same_layers(top, target)


def test_files_of_two_layers_with_one_name_are_refused(reflink_dir: Path, qemu_img: QemuImg) -> None:
    base = make_disk(reflink_dir / "disk-s001.raw", MIB)
    image = reflink_dir / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "raw", image)
    refused(
        image,
        reflink_dir / "disk.vmdk",
        PlanError,
        r"disk-s001\.vmdk: would be made twice",
        options={"subformat": "twoGbMaxExtentSparse"},
    )


# Refused beforehand


WRITTEN = {name for name, one in installed().formats.items() if one.can_write}


@pytest.mark.parametrize("target", sorted(WRITTEN - set(formats())))
def test_a_format_that_cannot_have_a_parent_is_refused_by_name(top: Path, target: str) -> None:
    error = refused(top, top.with_name(f"new{suffix(target)}"), UsageError, f"{target} cannot have a backing file")
    assert "without --chain" in str(error.hint)


def test_an_image_without_a_parent_is_a_chain_of_one(reflink_dir: Path) -> None:
    raw = make_disk(reflink_dir / "disk.raw", MIB)
    assert vmconv.convert(str(raw), str(reflink_dir / "disk.hdd"), chain=True).layers == ()


def test_a_layer_that_would_be_copied_is_refused_before_anything_is_made(reflink_dir: Path, qemu_img: QemuImg) -> None:
    raw, base, top = (reflink_dir / name for name in ("disk.raw", "base.qcow2", "top.qcow2"))
    raw.write_bytes(b"text that compresses " * 50000)
    qemu_img("convert", "-c", "-O", "qcow2", raw, base)
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    scribble(top, MIB, 1, unit=CLUSTER)
    refused(top, reflink_dir / "new.vmdk", ZeroCopyError, "decompressed", zero_copy="require")
    result = vmconv.convert(str(top), str(reflink_dir / "new.vmdk"), chain=True)
    assert [copy.bytes for copy in result.copies] == [result.totals.copied] != [0]
    assert_same_layers(top, reflink_dir / "new.vmdk")


def test_losses_say_which_layer_has_them(reflink_dir: Path, qemu_img: QemuImg) -> None:
    base, top = reflink_dir / "base.qcow2", reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_img("snapshot", "-c", "first", base)
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    result = vmconv.convert(str(top), str(reflink_dir / "new.vmdk"), chain=True)
    assert result.losses == ("base.qcow2: 1 internal snapshot (convert --snapshot converts one)",)


# Part of a chain


def test_layers_above_a_kept_layer_are_converted_onto_it(top: Path, qemu_img: QemuImg) -> None:
    target = top.with_name("new.qcow2")
    middle = top.with_name("middle.qcow2").rename(top.with_name("between.qcow2"))
    qemu_img("rebase", "-u", "-b", middle.name, "-F", "qcow2", top)
    (top.parent / "new").mkdir()
    target = top.parent / "new" / "top.qcow2"
    result = vmconv.convert(str(top), str(target), chain=True, backing_file="../base.qcow2")
    assert result.layers == ("between.qcow2",)
    assert vmconv.info(str(target.with_name("between.qcow2")))["backing-filename"] == "../base.qcow2"
    qemu_img("compare", top, target)


def test_an_internal_snapshot_is_the_top_of_its_chain(top: Path, qemu_img: QemuImg) -> None:
    wanted = flattened(top, top.with_name("before.raw"))
    qemu_img("snapshot", "-c", "before", top)
    scribble(top, SIZE, 9)
    vmconv.convert(str(top), str(top.with_name("new.vmdk")), chain=True, snapshot="before")
    assert vmconv.compare(str(wanted), str(top.with_name("new.vmdk")))


# All or nothing

DYING = """
import os, signal, sys
from vmconv import api
from vmconv.backends.files import FileOutput
from vmconv.backends.reflink import ReflinkOutput

owner, name, count, source, target = sys.argv[1:]
owner = {"FileOutput": FileOutput, "ReflinkOutput": ReflinkOutput, "os": os}[owner]
real, calls = getattr(owner, name), 0

def dying(*arguments, **more):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **more)

setattr(owner, name, dying)
api.convert(source, target, chain=True)
"""


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        ("ReflinkOutput", "share", 2),
        ("FileOutput", "write", 8),
        ("FileOutput", "finish", 2),
        ("FileOutput", "finish", 3),
        ("os", "link", 1),
    ],
)
def test_a_killed_run_leaves_no_layer_and_the_next_one_cleans_up(top: Path, owner: str, name: str, count: int) -> None:
    before = set(os.listdir(top.parent))
    target = top.with_name("new.vmdk")
    command = [sys.executable, "-c", DYING, owner, name, str(count), str(top), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not [left for left in set(os.listdir(top.parent)) - before if not left.endswith(".tmp")]
    vmconv.convert(str(top), str(target), chain=True)
    assert set(os.listdir(top.parent)) == before | {"base.vmdk", "middle.vmdk", "new.vmdk"}
    assert_same_layers(top, target)


def test_a_failure_while_files_are_named_leaves_none(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.link, itertools.count(1)

    def failing(*arguments: Any, **more: Any) -> None:
        if next(calls) == 3:
            raise OSError(errno.EIO, "Input/output error", "new.vmdk")
        real(*arguments, **more)

    monkeypatch.setattr(os, "link", failing)
    monkeypatch.setattr(os, "rename", failing_rename)
    refused(top, top.with_name("new.vmdk"), BackendError, "cannot be renamed to its final name")


def failing_rename(*arguments: Any) -> None:
    raise OSError(errno.EIO, "Input/output error", "new.vmdk")


def test_a_chain_whose_links_are_wrong_is_noticed(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vmconv_vhdx.writer

    def wrong(_image: Image, _backing: object) -> UUID:
        return UUID(int=1)

    monkeypatch.setattr(vmconv_vhdx.writer, "_linkage", wrong)
    refused(top, top.with_name("new.vhdx"), VerifyError, "data write GUID")


def test_a_layer_that_is_wrong_is_noticed(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = installed().formats["vmdk"].write, itertools.count(1)

    def wrong(image: Image, *arguments: Any, **more: Any) -> Layout:
        if next(calls) == 2:
            image = Image(image.format_name, image.file, image.size, lambda: Extents.filled(image.size))
            more = {}
        return real(image, *arguments, **more)

    monkeypatch.setattr(installed().formats["vmdk"], "write", wrong)
    refused(top, top.with_name("new.vmdk"), VerifyError, "parent|differs")


# The command line


def test_a_plan_of_a_chain_shows_its_layers(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(os.listdir(top.parent))
    assert cli.main(["plan", "--chain", str(top), str(top.with_name("new.vmdk"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  layer middle.qcow2 (qcow2) -> middle.vmdk" in lines
    assert "  layer base.qcow2 (qcow2) -> base.vmdk" in lines
    assert [line.split(":")[0] for line in lines if line.startswith("  file")] == [
        "  file base.vmdk",
        "  file middle.vmdk",
        "  file new.vmdk",
    ]
    assert set(os.listdir(top.parent)) == before
    assert cli.main(["plan", "--chain", "--output", "json", str(top), str(top.with_name("new.vmdk"))]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["layers"] == [
        {"source": "middle.qcow2", "source_format": "qcow2", "name": "middle.vmdk"},
        {"source": "base.qcow2", "source_format": "qcow2", "name": "base.vmdk"},
    ]


def test_a_conversion_of_a_chain_says_what_it_made(top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = top.with_name("new.vmdk")
    assert cli.main(["convert", "--chain", str(top), str(target)]) == 0
    assert capsys.readouterr().out.startswith(f"{target} on middle.vmdk on base.vmdk: shared ")
    assert cli.main(["convert", "--chain", "--force", "--output", "json", str(top), str(target)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["layers"] == ["middle.vmdk", "base.vmdk"]
