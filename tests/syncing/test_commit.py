"""`vmconv commit`: against a byte model, against `qemu-img commit`, and stopped at each call."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmconv
from support.crash import KILLED, failing_at, in_child, killed_at
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.mounts import Mounts
from support.stacks import Stack, content, make_stack
from support.tried import TRIED
from vmconv.cli.main import main
from vmconv.errors import PlanError

Capture = pytest.CaptureFixture[str]
COUNT = int(os.environ.get("VMCONV_STACKS", "24"))


def guest(qemu_img: QemuImg, image: Path, format_name: str) -> bytes:
    """Returns what QEMU reads."""
    back = image.with_name("read.raw")
    qemu_img("convert", "-f", format_name, "-O", "raw", image, back)
    data = back.read_bytes()
    back.unlink()
    return data


def committed(made: Stack, level: int) -> bytes:
    """Returns what the layer `level` has to read once all above is in it."""
    top, base = content(made.layers), content(made.layers[level:])
    return top + base[len(top) :]


# -- random chains


@pytest.mark.parametrize("number", range(COUNT))
def test_the_base_gets_what_the_top_reads(number: int, any_dir: Path, qemu_img: QemuImg) -> None:
    made = make_stack(any_dir, number)
    rng = random.Random(number)
    level = rng.randrange(1, len(made.files))
    keep = rng.random() < 0.3
    wanted, below = content(made.layers), committed(made, level)
    try:
        # A raw disk that ends within a sector is rounded up.
        result = vmconv.commit(made.files[0], base=made.files[level], keep_top=keep, force=True)
    except PlanError as exc:
        refused = "id of its content", "cannot have", "must be as large as its parent"
        assert any(words in str(exc) for words in refused), exc
        assert guest(qemu_img, made.files[0], made.formats[0]) == wanted
        return
    assert result.emptied == (level == 1 and not keep)
    assert guest(qemu_img, made.files[0], made.formats[0]) == wanted
    found = guest(qemu_img, made.files[level], made.formats[level])
    assert found[: len(below)] == below
    assert not any(found[len(below) :])
    if result.emptied:
        rows = vmconv.map_disk(made.files[0])
        assert not any(row.present and row.depth == 0 for row in rows)
    assert {path.name for path in any_dir.iterdir()} == {path.name for path in made.files}


@pytest.mark.parametrize("number", range(0, COUNT, 3))
def test_qemu_img_commit_makes_the_same_disks(number: int, tmp_path: Path, qemu_img: QemuImg) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    made = make_stack(ours, number)
    if made.formats[1] not in ("raw", "qcow2", "qed") or made.formats[0] == "vmdk":
        pytest.skip("QEMU commits into no other format, or does not resize it")
    shutil.copytree(ours, theirs)
    vmconv.commit(made.files[0], force=True)
    qemu_img("commit", "-q", "-f", made.formats[0], theirs / made.files[0].name)
    for path, kind in list(zip(made.files, made.formats, strict=True))[:2]:
        mine, other = guest(qemu_img, path, kind), guest(qemu_img, theirs / path.name, kind)
        assert mine == other, path.name


# -- what moves


def chain(directory: Path, qemu_img: QemuImg, kind: str = "qcow2", size: str = "16M") -> tuple[Path, Path]:
    """Makes a layer of `size` with 2 MiB of content on a base of 16 MiB."""
    base, top = directory / f"base.{kind}", directory / "top.qcow2"
    vmconv.convert(make_disk(directory / "disk.img", 16 * MIB), base)
    (directory / "disk.img").unlink()
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "vpc" if kind == "vhd" else kind, top, size)
    qemu_io(top, "write -P 7 3M 1M", "write -P 8 9M 1M", "write -z 1M 64k", format_name="qcow2")
    return base, top


@pytest.mark.parametrize("kind", ["qcow2", "raw", "vhdx", "vhd", "vdi", "qed", "vmdk"])
def test_all_is_shared_where_storage_can(kind: str, reflink_dir: Path, qemu_img: QemuImg) -> None:
    base, top = chain(reflink_dir, qemu_img, kind)
    wanted = guest(qemu_img, top, "qcow2")
    result = vmconv.commit(top)
    assert result.totals.shared
    assert not result.totals.copied
    assert result.emptied
    assert guest(qemu_img, top, "qcow2") == wanted
    vmconv.convert(base, reflink_dir / "base.img", target_format="raw")
    assert (reflink_dir / "base.img").read_bytes()[: 16 * MIB] == wanted


@pytest.mark.parametrize("kind", ["qcow2", "raw", "vhdx"])
def test_only_what_the_layer_holds_is_copied_elsewhere(kind: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    base, top = chain(ext4_dir, qemu_img, kind)
    inode, wanted = base.stat().st_ino, guest(qemu_img, top, "qcow2")
    result = vmconv.commit(top)
    assert base.stat().st_ino == inode
    assert 2 * MIB <= result.totals.copied <= 2 * MIB + 65536
    assert guest(qemu_img, top, "qcow2") == wanted


def test_a_smaller_base_grows(any_dir: Path, qemu_img: QemuImg) -> None:
    for kind in ("qcow2", "raw"):
        base, top = chain(any_dir, qemu_img, kind, "40M")
        qemu_io(top, "write -P 9 39M 1M", format_name="qcow2")
        wanted = guest(qemu_img, top, "qcow2")
        vmconv.commit(top)
        assert guest(qemu_img, base, kind) == wanted == guest(qemu_img, top, "qcow2")
        base.unlink()
        top.unlink()


def test_a_larger_base_keeps_its_end(any_dir: Path, qemu_img: QemuImg) -> None:
    base, top = chain(any_dir, qemu_img, "qcow2", "10M")
    before, wanted = guest(qemu_img, base, "qcow2"), guest(qemu_img, top, "qcow2")
    vmconv.commit(top)
    assert guest(qemu_img, base, "qcow2") == wanted + before[10 * MIB :]


def test_a_second_commit_has_nothing_to_do(any_dir: Path, qemu_img: QemuImg) -> None:
    base, top = chain(any_dir, qemu_img)
    vmconv.commit(top)
    before = base.read_bytes()
    result = vmconv.commit(top)
    assert (result.backend, result.totals.written) == ("none", 0)
    assert base.read_bytes() == before


def test_the_layer_keeps_its_options(tmp_path: Path, qemu_img: QemuImg) -> None:
    qemu_img("create", "-q", "-f", "raw", tmp_path / "base.raw", "16M")
    top = tmp_path / "top.qcow2"
    options = "cluster_size=16k,extended_l2=on,lazy_refcounts=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", top)
    qemu_io(top, "write -P 7 3M 1M", format_name="qcow2")
    before = vmconv.info(top)
    vmconv.commit(top)
    after = vmconv.info(top)
    for name in ("cluster-size", "backing-filename", "backing-filename-format", "format-specific", "virtual-size"):
        assert after[name] == before[name]


def test_a_top_named_by_a_link_in_another_directory_is_emptied(tmp_path: Path, qemu_img: QemuImg) -> None:
    images, links = tmp_path / "images", tmp_path / "links"
    images.mkdir()
    links.mkdir()
    base, top = chain(images, qemu_img)
    wanted = guest(qemu_img, top, "qcow2")
    (links / "top.qcow2").symlink_to(top)
    assert vmconv.commit(links / "top.qcow2", allow_external=[images]).emptied
    assert guest(qemu_img, base, "qcow2") == wanted == guest(qemu_img, top, "qcow2")
    assert not any(row.present and row.depth == 0 for row in vmconv.map_disk(top))


# -- refusals


def test_another_layer_on_the_base_is_named(tmp_path: Path, qemu_img: QemuImg, capsys: Capture) -> None:
    base, top = chain(tmp_path, qemu_img)
    vmconv.create(tmp_path / "other.qcow2", backing_file=base.name)
    before = base.read_bytes(), top.read_bytes()
    assert main(["commit", str(top)]) == 1
    said = capsys.readouterr().err
    assert "other.qcow2: is on top of base.qcow2, too" in said
    assert "--force" in said
    assert (base.read_bytes(), top.read_bytes()) == before
    assert main(["commit", "--force", "--output", "json", str(top)]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["emptied"] is True


def test_what_cannot_be_committed_is_refused(tmp_path: Path, qemu_img: QemuImg) -> None:
    base, top = chain(tmp_path, qemu_img)
    with pytest.raises(PlanError, match="has no base"):
        vmconv.commit(base)
    with pytest.raises(PlanError, match="is no layer below"):
        vmconv.commit(top, base=top)
    with pytest.raises(PlanError, match="does not exist"):
        vmconv.commit(top, base="nothing.qcow2")
    qemu_img("snapshot", "-c", "one", top)
    with pytest.raises(PlanError, match="would lose"):
        vmconv.commit(top)
    assert not vmconv.commit(top, keep_top=True).emptied


def test_a_layer_that_knows_its_parent_by_content_is_refused_and_stays(tmp_path: Path, qemu_img: QemuImg) -> None:
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    vmconv.convert(make_disk(tmp_path / "disk.raw", 4 * MIB), base)
    qemu_img("create", "-q", "-f", "vmdk", "-b", base.name, "-F", "vmdk", top)
    qemu_io(top, "write -P 7 3M 1M", format_name="vmdk")
    before = base.read_bytes(), top.read_bytes()
    with pytest.raises(PlanError, match="by an id of its content") as refused:
        vmconv.commit(top)
    assert (base.read_bytes(), top.read_bytes()) == before
    # The hint's command makes the disk that the commit would have made.
    assert refused.value.hint
    _, _, command = refused.value.hint.partition(": vmconv ")
    merged = tmp_path / "merged.vmdk"
    assert main([str(merged) if word == "NEW" else word for word in command.split()]) == 0
    assert vmconv.compare(top, merged)


# -- stopped

WAYS = [("ext4", "qcow2"), ("ext4", "raw"), ("xfs", "qcow2"), ("xfs", "raw")]


class Work:
    """A chain to commit, made again for each run."""

    def __init__(self, root: Path, kind: str, qemu_img: QemuImg) -> None:
        self.template, self.directory = root / "template", root / "work"
        self.template.mkdir()
        base, top = chain(self.template, qemu_img, kind)
        self.kind, self.base, self.top = kind, self.directory / base.name, self.directory / top.name
        self.wanted = guest(qemu_img, top, "qcow2")

    def again(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(self.template, self.directory)

    def run(self) -> None:
        vmconv.commit(self.top)

    def calls(self) -> int:
        self.again()
        made = mmap.mmap(-1, 8)

        def reached(number: int) -> None:
            made[:8] = (number + 1).to_bytes(8, "little")

        assert in_child(self.run, reached) == 0
        return int.from_bytes(made[:8], "little")


@pytest.fixture
def work(mounts: Mounts, request: pytest.FixtureRequest, qemu_img: QemuImg) -> Iterator[Work]:
    kind, format_name = request.param
    root = mounts.get(kind) / "commit"
    root.mkdir()
    yield Work(root, format_name, qemu_img)
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [killed_at, failing_at], ids=["killed", "failing"])
@pytest.mark.parametrize("work", WAYS, ids="-".join, indirect=True)
def test_a_commit_that_is_stopped_leaves_the_top_as_it_reads(work: Work, stop: object, qemu_img: QemuImg) -> None:
    calls = work.calls()
    for number in range(calls):
        work.again()
        assert in_child(work.run, stop(number)) in (0, 1, KILLED)  # type: ignore[operator]
        # Opening the chain settles what was interrupted.
        assert vmconv.map_disk(work.top), number
        assert guest(qemu_img, work.top, "qcow2") == work.wanted, number
        work.run()
        assert guest(qemu_img, work.top, "qcow2") == work.wanted == guest(qemu_img, work.base, work.kind), number
        assert {path.name for path in work.directory.iterdir()} == {work.base.name, work.top.name}, number
        TRIED["stops of a commit"] += 1
