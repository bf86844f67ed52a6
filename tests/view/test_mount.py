"""`vmconv mount`: real mounts, read as any program reads files."""

from __future__ import annotations

import contextlib
import errno
import lzma
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.holders import qemu_io as held_by_qemu
from support.mounting import ERRORS, PATIENCE, mounted, need_fuse
from support.variants import Variant, has_identity, options, qemu_name, variants
from vmconv.cli.main import main
from vmconv.io.registry import installed
from vmconv_view import tree as tree_module
from vmconv_view.tree import Tree

SIZE = 12 * MIB
_IDS = re.compile(
    rb'(?<=\nCID=)[0-9a-f]{8}|(?<=longContentID = ")[0-9a-f]{32}|(?<=uuid\.image = ")[0-9a-f-]{36}'
    rb'|(?<=uuid\.modification = ")[0-9a-f-]{36}'
)


@pytest.fixture(autouse=True, scope="module")
def fuse() -> None:
    need_fuse()


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def digests_but_ids(directory: Path) -> dict[str, str]:
    """Returns what `digests` does, without the ids of a VMDK that no option says."""
    return {path.name: sha256(_IDS.sub(b"", path.read_bytes())).hexdigest() for path in sorted(directory.iterdir())}


def is_offered(variant: Variant) -> bool:
    """True for the default of each format, and for each subformat that can be viewed."""
    return (
        options(variant).get("subformat") not in installed().formats[variant[0]].not_mountable
        and variant[1] != "static=on"
    )


def shown_as(variant: Variant) -> str:
    """Returns the name of the directory that a mount has for a variant."""
    one = installed().formats[variant[0]]
    subformat = options(variant).get("subformat")
    return (
        variant[0] if subformat in (None, getattr(one.options()(), "subformat", None)) else f"{variant[0]}-{subformat}"
    )


def as_shown(variant: Variant, image: Path) -> dict[str, str]:
    """Returns the options with which `convert` makes the very bytes that a mount shows, its ids included."""
    said = vmconv.info(str(image), allow_external=[str(image.parent)])["disk"].get("identity")
    # VMDK states an identity that was asked for in one more line.
    asked = has_identity(variant) and variant[0] != "vmdk" and said
    return {**options(variant), **({"identity": said} if asked else {})}


OFFERED = [variant for variant in variants() if is_offered(variant)]


@pytest.mark.parametrize("source", ["raw", "vmdk", "vhd"])
def test_a_view_has_the_bytes_of_a_conversion(xfs_dir: Path, point: Path, qemu_img: QemuImg, source: str) -> None:
    images = xfs_dir / "images"
    images.mkdir()
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    image = images / f"disk{installed().formats[source].suffixes[0]}"
    vmconv.convert(str(raw), str(image))
    with mounted(images, point):
        shown = point / image.name
        assert sorted(os.listdir(shown)) == sorted(["partitions", *map(shown_as, OFFERED)])
        for variant in OFFERED:
            made = xfs_dir / shown_as(variant)
            made.mkdir()
            target = made / f"disk{installed().formats[variant[0]].suffixes[0]}"
            vmconv.convert(str(image), str(target), options=as_shown(variant, shown / made.name / target.name))
            assert digests_but_ids(shown / made.name) == digests_but_ids(made), variant
            assert os.stat(shown / made.name / target.name).st_size == os.stat(target).st_size
            qemu_img("compare", "-f", "raw", "-F", qemu_name(variant), raw, shown / made.name / target.name)


def test_every_format_can_be_the_source(xfs_dir: Path, point: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    images = xfs_dir / "images"
    images.mkdir()
    wanted = sha256(raw.read_bytes()).hexdigest()
    formats = sorted(name for name, one in installed().formats.items() if one.can_write)
    for name in formats:
        vmconv.convert(str(raw), str(images / f"{name}{installed().formats[name].suffixes[0]}"), target_format=name)
    with mounted(images, point):
        for image in os.listdir(point):
            (found,) = digests(point / image / "raw").values()
            assert found == wanted, image
        assert len(os.listdir(point)) == len(formats)


def test_compressed_clusters_are_shown_decompressed(xfs_dir: Path, point: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    images = xfs_dir / "images"
    images.mkdir()
    qemu_img("convert", "-c", "-O", "qcow2", raw, images / "packed.qcow2")
    with mounted(images, point):
        (found,) = digests(point / "packed.qcow2" / "raw").values()
    assert found == sha256(raw.read_bytes()).hexdigest()


def test_three_readers_at_once_read_the_same(xfs_dir: Path, point: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 64 * MIB, pieces=200)
    vmconv.convert(str(raw), str(xfs_dir / "disk.qcow2"))
    found: list[dict[str, str]] = []
    with mounted(xfs_dir, point):
        readers = [
            threading.Thread(target=lambda: found.append(digests(point / "disk.qcow2" / "vhdx"))) for _ in range(3)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert len(found) == 3
        (wanted,) = digests(point / "disk.qcow2" / "raw").values()
    assert found[0] == found[1] == found[2]
    assert wanted == sha256(raw.read_bytes()).hexdigest()


def test_holes_are_seen_through_the_mount(xfs_dir: Path, point: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE, pieces=4)
    vmconv.convert(str(raw), str(xfs_dir / "disk.qcow2"))
    with mounted(xfs_dir, point):
        shown = point / "disk.qcow2" / "raw" / "disk.raw"
        assert qemu_img("map", "--output=json", "-f", "raw", shown).stdout.replace(str(shown), "") == qemu_img(
            "map", "--output=json", "-f", "raw", raw
        ).stdout.replace(str(raw), "")
        assert shown.stat().st_blocks == raw.stat().st_blocks
        with shown.open("rb") as file, pytest.raises(OSError, match="No such device or address"):
            os.lseek(file.fileno(), SIZE, os.SEEK_DATA)


def test_a_source_that_changes_during_a_read_is_an_error_and_then_shown_again(xfs_dir: Path, point: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    with mounted(xfs_dir, point) as running:
        shown = point / "disk.raw" / "qcow2" / "disk.qcow2"
        with shown.open("rb", buffering=0) as file:
            assert file.read(4) == b"QFI\xfb"
            with raw.open("r+b") as changed:
                changed.seek(1)
                changed.write(b"new")
            file.seek(shown.stat().st_size // 2 // 65536 * 65536)
            with pytest.raises(OSError, match="Input/output error") as caught:
                while file.read(MIB):
                    pass
            assert caught.value.errno == errno.EIO
        again = xfs_dir / "again.raw"
        vmconv.convert(str(shown), str(again))
        assert again.read_bytes() == raw.read_bytes()
    assert running.said.count("disk.raw: changed while it was being viewed") == 1


def test_qemu_may_write_to_an_image_without_open_views(xfs_dir: Path, point: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    qemu_img("convert", "-O", "qcow2", raw, xfs_dir / "disk.qcow2")
    with mounted(xfs_dir, point):
        shown = point / "disk.qcow2" / "raw" / "disk.raw"
        size = shown.stat().st_size
        with shown.open("rb", buffering=0) as file:
            file.read(512)
            done = subprocess.run(
                ["qemu-io", "-c", "write 0 512", str(xfs_dir / "disk.qcow2")],
                capture_output=True,
                text=True,
                check=False,
            )
            assert "lock" in done.stderr
        qemu_io(xfs_dir / "disk.qcow2", "write -P 7 0 1M")
        assert shown.read_bytes()[:MIB] == bytes([7]) * MIB
        assert size == SIZE
        with held_by_qemu(xfs_dir / "disk.qcow2", "qcow2"), pytest.raises(OSError, match="Input/output error"):
            shown.read_bytes()


def test_an_unreadable_image_gives_its_reason_and_harms_no_other(xfs_dir: Path, point: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "good.raw", SIZE)
    (xfs_dir / "noise.vmdk").write_bytes(os.urandom(5000))
    (xfs_dir / "empty.vhdx").write_bytes(b"")
    (xfs_dir / "empty.raw").write_bytes(b"")
    (xfs_dir / "notes.txt").write_text("no image")
    (xfs_dir / "directory.qcow2").mkdir()
    (xfs_dir / "dangling.raw").symlink_to(xfs_dir / "nothing")
    (xfs_dir / "outside.raw").symlink_to("/etc/hostname")
    os.mkfifo(xfs_dir / "pipe.raw")
    Path(os.fsdecode(os.fsencode(xfs_dir) + b"/\xff\n.raw")).write_bytes(bytes(512))
    for name, backing in (("a", "b"), ("b", "a")):
        qemu_img(
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            f"{backing}.qcow2",
            "-F",
            "qcow2",
            xfs_dir / f"{name}.qcow2",
            "1M",
        )
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", xfs_dir / "thief.qcow2", "1M")
    with mounted(xfs_dir, point) as running:
        found = {os.fsencode(name) for name in os.listdir(point)}
        assert found == {
            b"good.raw", b"noise.vmdk", b"empty.vhdx", b"empty.raw", b"outside.raw", b"\xff\n.raw",
            b"a.qcow2", b"b.qcow2", b"thief.qcow2",
        }  # fmt: skip
        texts = read_everything(point)
        assert "no signature of vmdk" in texts["noise.vmdk"]
        assert "lies outside" in texts["outside.raw"]
        assert "loop" in texts["a.qcow2/raw"]
        assert "lies outside" in texts["thief.qcow2/vmdk"]
        assert "empty.vhdx" in texts["empty.vhdx"]
        assert not any(place.startswith("good.raw") for place in texts)
        assert (point / "good.raw" / "raw" / "good.raw").read_bytes() == raw.read_bytes()
        assert not (point / "notes.txt").exists()
        assert running.process.poll() is None
    assert "Traceback" not in running.said


def read_everything(point: Path) -> dict[str, str]:
    """Reads every file of a mount, and returns the texts of those that say why something is not there."""
    texts = {}
    for directory, _, names in os.walk(point):
        for name in names:
            try:
                data = Path(directory, name).read_bytes()
            except OSError:
                # It was listed before it was planned, which showed that it cannot be made.
                assert os.listdir(directory) == [ERRORS]
                data = Path(directory, ERRORS).read_bytes()
            if os.listdir(directory) == [ERRORS]:
                texts[os.path.relpath(directory, point)] = data.decode(errors="surrogateescape")
                assert data.endswith(b"\n")
    return texts


def damaged_images(corpus: Path, directory: Path) -> int:
    """Writes small images of the corpus with wrong bytes all over their metadata; returns how many."""
    written = 0
    for path in sorted((corpus / "images").rglob("*.xz")):
        suffix = path.with_suffix("").suffix
        if installed().format_by_suffix(f"x{suffix}") not in installed().formats:
            continue
        with lzma.open(path) as file:
            data = bytearray(file.read(4 * MIB + 1))
        if len(data) <= 4 * MIB:
            for at in range(len(data) // 50, min(len(data), 70_000), 977):
                data[at] ^= 0x5A
            (directory / f"{written}{suffix}").write_bytes(data)
            written += 1
    return written


def test_damaged_images_harm_nothing(xfs_dir: Path, point: Path, corpus: Path) -> None:
    written = damaged_images(corpus, xfs_dir)
    assert written > 10
    with mounted(xfs_dir, point) as running:
        for image in os.listdir(point):
            for variant in ("raw", ".", "qcow2"):
                place = point / image / variant
                for name in os.listdir(place) if place.is_dir() else ():
                    with contextlib.suppress(OSError), (place / name).open("rb") as file:
                        file.read(MIB)
        assert running.process.poll() is None
        assert len(os.listdir(point)) == written
    assert "Traceback" not in running.said


def open_files(process: subprocess.Popen[str], directory: Path) -> int:
    links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    return sum(link.startswith(f"{directory}/") for link in links)


def test_mounting_and_listing_many_images_reads_none_of_them(xfs_dir: Path, point: Path) -> None:
    one = make_disk(xfs_dir / "0.raw", MIB)
    for number in range(1, 1000):
        os.link(one, xfs_dir / f"{number}.raw")
    with mounted(xfs_dir, point) as running:
        before = Path(f"/proc/{running.process.pid}/io").read_text()
        assert len(os.listdir(point)) == 1000
        after = Path(f"/proc/{running.process.pid}/io").read_text()
        calls = [int(text.split("syscr: ")[1].split()[0]) for text in (before, after)]
        assert calls[1] - calls[0] < 100
        assert open_files(running.process, xfs_dir) == 0
        (point / "7.raw" / "vmdk" / "7.vmdk").read_bytes()
        assert open_files(running.process, xfs_dir) == 1


@pytest.mark.parametrize("how", ["fusermount3", "umount", "SIGINT", "SIGTERM"])
def test_a_mount_ends_by_unmounting_or_a_signal(xfs_dir: Path, point: Path, how: str) -> None:
    make_disk(xfs_dir / "disk.raw", MIB)
    with mounted(xfs_dir, point) as running:
        (point / "disk.raw" / "vdi" / "disk.vdi").read_bytes()
        if how.startswith("SIG"):
            running.process.send_signal(getattr(signal, how))
        else:
            subprocess.run([how, *(["-u"] if how == "fusermount3" else []), str(point)], check=True)
        assert running.end() == 0, running.said
    assert not os.path.ismount(point)
    assert running.said == ""


def test_fork_returns_when_it_is_mounted(xfs_dir: Path, point: Path) -> None:
    make_disk(xfs_dir / "disk.raw", MIB)
    done = subprocess.run(
        [sys.executable, "-m", "vmconv", "mount", "--fork", str(xfs_dir), str(point)],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(point) == ["disk.raw"]
    subprocess.run(["fusermount3", "-u", str(point)], check=True)


def test_fork_returns_the_error_of_a_mount_that_fails(xfs_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmconv", "mount", "--fork", str(xfs_dir), str(tmp_path / "none")],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"vmconv: {tmp_path / 'none'}: is not a directory\n"


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_a_mount_that_would_read_itself_is_refused(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    (images / "inside").mkdir(parents=True)
    assert main(["mount", str(images), str(images / where)]) == 2
    assert "would hide" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--allow-other"]])
def test_other_users_see_what_they_may_and_only_when_allowed(point: Path, flags: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="vmconv-images-") as made, contextlib.ExitStack() as stack:
        images = Path(made)
        images.chmod(0o755)
        make_disk(images / "public.raw", MIB).chmod(0o644)
        make_disk(images / "secret.raw", MIB).chmod(0o600)
        stack.enter_context(mounted(images, point, *flags))
        for name, expected in (("public", bool(flags)), ("secret", False)):
            path = point / f"{name}.raw" / "vhd" / f"{name}.vhd"
            done = subprocess.run(["cat", str(path)], user=65534, group=65534, capture_output=True, check=False)
            assert (done.returncode == 0) == expected, done.stderr
            with pytest.raises(OSError, match="Read-only file system"):
                path.open("r+b")


# The tree, without a mount


def test_images_not_held_are_dropped_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MAX_COST", 70_000)
    for number in range(10):
        make_disk(tmp_path / f"{number}.raw", MIB, seed=number)
    tree = Tree(installed(), str(tmp_path))
    held = tree.open("0.raw/qcow2/0.qcow2")
    before = held.view.read(0, held.view.size)
    for number in range(10):
        assert tree.node(f"{number}.raw/vhdx/{number}.vhdx").view
    assert descriptors(tmp_path) <= 4
    assert held.view.read(0, held.view.size) == before
    held.release()
    tree.close()
    assert descriptors(tmp_path) == 0


def descriptors(directory: Path) -> int:
    """Returns how many files below a directory this process has open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(link))
    return sum(link.startswith(f"{directory}/") for link in links)


def test_a_defect_of_a_writer_is_shown_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk(tmp_path / "disk.raw", MIB)

    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no good\nat all")

    monkeypatch.setattr(type(installed().formats["vdi"]), "write", broken)
    tree = Tree(installed(), str(tmp_path))
    node = tree.node(f"disk.raw/vdi/{ERRORS}")
    assert node.view
    text = node.view.read(0, node.view.size).decode()
    assert text == "disk.raw as vdi: defect of vmconv or of a plugin: ZeroDivisionError: no good\\nat all\n"
    assert tree.node("disk.raw/vhd/disk.vhd").view
    tree.close()


def test_formats_that_need_all_payload_for_their_size_are_not_offered(tmp_path: Path) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    tree = Tree(installed(), str(tmp_path))
    names = list(tree.node("disk.raw").names())
    tree.close()
    assert "vmdk-monolithicFlat" in names
    assert "vmdk-streamOptimized" not in names


def test_the_format_that_is_named_is_that_of_one_image(
    tmp_path: Path, point: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    vmconv.convert(str(make_disk(tmp_path / "disk.raw", SIZE)), str(images / "disk.img"), target_format="qcow2")
    with mounted(images / "disk.img", point, "-f", "raw", "--formats", "raw"):
        assert digests(point / "disk.img/raw") == {"disk.raw": sha256((images / "disk.img").read_bytes()).hexdigest()}
    assert main(["mount", "-f", "raw", str(images), str(point)]) == 2
    assert "-f is for one image" in capsys.readouterr().err
