"""`vmconv rebase` without -u: against a byte model, against `qemu-img rebase`, and stopped at each call."""

from __future__ import annotations

import mmap
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmconv
from support import holders
from support.crash import KILLED, failing_at, in_child, killed_at
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.mounts import Mounts
from support.stacks import SUFFIXES, content, make_stack
from support.tried import TRIED
from vmconv.errors import AccessError, PlanError, UsageError
from vmconv.syncing.rebase import RebaseResult

COUNT = int(os.environ.get("VMCONV_STACKS", "24"))


def guest(qemu_img: QemuImg, image: Path) -> bytes:
    """Returns what QEMU reads."""
    back = image.with_name("read.raw")
    qemu_img("convert", "-f", image.suffix[1:], "-O", "raw", image, back)
    data = back.read_bytes()
    back.unlink()
    return data


def rebased(image: Path, base: str, **given: str) -> RebaseResult:
    result = vmconv.rebase(image, base, **given)  # type: ignore[arg-type]
    assert isinstance(result, RebaseResult)
    return result


@pytest.mark.parametrize("number", range(COUNT))
def test_the_disk_stays_as_it_is_on_any_base(number: int, any_dir: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    made, other, rng = make_stack(any_dir, number), make_stack(tmp_path, number + 1000), random.Random(number)
    kind, top = other.formats[-1], made.files[0]
    base = any_dir / f"new.{SUFFIXES.get(kind, kind)}"
    shutil.copy(other.files[-1], base)
    wanted, flattens = content(made.layers), rng.random() < 0.25
    try:
        rebased(top, "" if flattens else base.name, **({} if flattens else {"backing_format": kind}))
    except PlanError as exc:
        # A VMDK is on nothing but a VMDK of its size.
        assert made.formats[0] == "vmdk" or "cannot be a backing file" in str(exc), exc
        assert guest(qemu_img, top) == wanted
        return
    assert guest(qemu_img, top) == wanted
    assert vmconv.info(top).get("backing-filename") == (None if flattens else base.name)
    assert {path.name for path in any_dir.iterdir()} == {path.name for path in (*made.files, base)}


@pytest.mark.parametrize("number", range(0, COUNT, 3))
def test_qemu_img_rebase_makes_the_same_disk(number: int, tmp_path: Path, qemu_img: QemuImg) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    made = make_stack(ours, number)
    top, base, kind = made.files[0], made.files[-1], made.formats[-1]
    if made.formats[0] == "vmdk":
        pytest.skip("QEMU gives a VMDK no other base")
    shutil.copytree(ours, theirs)
    rebased(top, base.name, backing_format=kind)
    qemu_img("rebase", "-f", made.formats[0], "-b", base.name, "-F", kind, theirs / top.name)
    assert guest(qemu_img, top) == guest(qemu_img, theirs / top.name) == content(made.layers)


# -- what moves


def chain(directory: Path, qemu_img: QemuImg) -> tuple[Path, Path, Path]:
    """Makes a layer with 2 MiB of its own, its base, and another base that differs in 1 MiB and shares all else."""
    base, other, top = directory / "base.qcow2", directory / "other.qcow2", directory / "top.qcow2"
    vmconv.convert(make_disk(directory / "disk.img", 16 * MIB, pieces=1, unit=16 * MIB), base)
    (directory / "disk.img").unlink()
    vmconv.convert(base, other)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, "20M")
    qemu_io(top, "write -P 7 3M 1M", "write -P 8 9M 1M", format_name="qcow2")
    qemu_io(other, "write -P 9 5M 1M", "write -P 9 9M 1M", format_name="qcow2")
    return base, other, top


def test_only_what_differs_becomes_the_layers_own(reflink_dir: Path, qemu_img: QemuImg) -> None:
    _, other, top = chain(reflink_dir, qemu_img)
    wanted = guest(qemu_img, top)
    result = rebased(top, other.name)
    assert guest(qemu_img, top) == wanted
    assert (result.own, result.totals.copied, result.totals.shared) == (MIB, 0, 3 * MIB)
    # All else has the same physical blocks, and is not read.
    assert result.compared <= 2 * 2 * MIB


def test_elsewhere_the_layer_gets_what_differs_behind_its_end(ext4_dir: Path, qemu_img: QemuImg) -> None:
    _, other, top = chain(ext4_dir, qemu_img)
    wanted, inode = guest(qemu_img, top), top.stat().st_ino
    result = rebased(top, other.name)
    assert (guest(qemu_img, top), top.stat().st_ino) == (wanted, inode)
    assert (result.own, result.totals.copied) == (MIB, MIB)


def test_without_a_base_the_layer_has_all(any_dir: Path, qemu_img: QemuImg) -> None:
    base, _, top = chain(any_dir, qemu_img)
    wanted = guest(qemu_img, top)
    rebased(top, "")
    base.unlink()
    assert guest(qemu_img, top) == wanted


# -- refusals


@pytest.mark.parametrize("name", ["base.qcow2", "other.qcow2"])
def test_a_parent_that_a_guest_writes_to_is_refused(name: str, tmp_path: Path, qemu_img: QemuImg) -> None:
    _, other, top = chain(tmp_path, qemu_img)
    before = top.read_bytes()
    with (
        holders.qemu_io(tmp_path / name, "qcow2"),
        pytest.raises(AccessError, match=f"{name}: is open for writing in another process"),
    ):
        rebased(top, other.name)
    assert top.read_bytes() == before


def test_what_cannot_be_rebased_is_refused(tmp_path: Path, qemu_img: QemuImg) -> None:
    base, other, top = chain(tmp_path, qemu_img)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    raw = make_disk(tmp_path / "disk.raw", MIB)
    for image, name, words in (
        (raw, base.name, "raw cannot have a backing file"),
        (base, top.name, "on top of it"),
        (top, top.name, "on top of it"),
        (top, "none.qcow2", "cannot be opened"),
        (tmp_path / "none.qcow2", base.name, "does not exist"),
    ):
        with pytest.raises((PlanError, vmconv.VmconvError), match=words):
            vmconv.rebase(image, name)
    with pytest.raises(UsageError, match="--keep-undo is for -u"):
        vmconv.rebase(top, other.name, keep_undo=True)
    with pytest.raises(UsageError, match="-F is the format"):
        vmconv.rebase(top, "", backing_format="raw")
    raw.unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    base.unlink()
    with pytest.raises(vmconv.VmconvError) as caught:
        vmconv.rebase(top, other.name)
    assert "-u" in (caught.value.hint or "")


# -- stopped


class Work:
    """A layer to rebase, made again for each run."""

    def __init__(self, root: Path, qemu_img: QemuImg) -> None:
        self.template, self.directory = root / "template", root / "work"
        self.template.mkdir()
        _, other, top = chain(self.template, qemu_img)
        self.other, self.top = other.name, self.directory / top.name
        self.wanted = guest(qemu_img, top)

    def again(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(self.template, self.directory)

    def run(self) -> None:
        vmconv.rebase(self.top, self.other)

    def calls(self) -> int:
        self.again()
        made = mmap.mmap(-1, 8)

        def reached(number: int) -> None:
            made[:8] = (number + 1).to_bytes(8, "little")

        assert in_child(self.run, reached) == 0
        return int.from_bytes(made[:8], "little")


@pytest.fixture(params=["ext4", "xfs"])
def work(mounts: Mounts, request: pytest.FixtureRequest, qemu_img: QemuImg) -> Iterator[Work]:
    root = mounts.get(request.param) / "rebase"
    root.mkdir()
    yield Work(root, qemu_img)
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [killed_at, failing_at], ids=["killed", "failing"])
def test_a_rebase_that_is_stopped_leaves_the_disk(work: Work, stop: object, qemu_img: QemuImg) -> None:
    for number in range(work.calls()):
        work.again()
        assert in_child(work.run, stop(number)) in (0, 1, KILLED)  # type: ignore[operator]
        # Opening it settles what was interrupted.
        assert vmconv.map_disk(work.top), number
        assert guest(qemu_img, work.top) == work.wanted, number
        work.run()
        assert guest(qemu_img, work.top) == work.wanted, number
        assert vmconv.info(work.top)["backing-filename"] == work.other
        assert len(list(work.directory.iterdir())) == 3, number
        TRIED["stops of a rebase"] += 1


def test_no_hint_names_an_option_that_rebase_lacks(tmp_path: Path, qemu_img: QemuImg) -> None:
    _, other, top = chain(tmp_path, qemu_img)
    (tmp_path / "second.qcow2").hardlink_to(top)
    with pytest.raises(PlanError, match="hard links") as caught:
        vmconv.rebase(top, other.name)
    assert caught.value.hint == "remove them first"
    (tmp_path / "second.qcow2").unlink()
    qemu_img("snapshot", "-c", "one", top)
    with pytest.raises(PlanError, match="would lose 1 internal snapshot") as caught:
        vmconv.rebase(top, other.name)
    assert caught.value.hint == "remove them first"
