"""`vmconv-qemu-img` beside the real qemu-img: output, exit code and disks are the same, for many forms of arguments."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.disks import QemuImg, qemu_io
from support.mounts import Mounts
from support.requirements import oracle_program
from vmconv.cli.qemu_img import front, handing

Capture = pytest.CaptureFixture[str]

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels")


@pytest.fixture(scope="module")
def prepared(mounts: Mounts, qemu_img: QemuImg) -> Iterator[Path]:
    """Small images of each format with the same content, and layers on them."""
    folder = mounts.get("xfs") / "prepared"
    folder.mkdir()
    raw = folder / "a.raw"
    qemu_img("create", "-f", "raw", raw, "8M")
    qemu_io(raw, "write -P 5 1M 1M", "write -P 6 4M 192k", "write -P 7 7M 64k", format_name="raw")
    for name in FORMATS[1:]:
        # Rounded to a geometry, a VHD would have another size.
        options = ("-o", "force_size=on") if name == "vpc" else ()
        qemu_img("convert", "-f", "raw", "-O", name, *options, raw, folder / f"a.{name}")
    for name in ("qcow2", "qed", "vmdk"):
        layer = folder / f"top.{name}"
        subprocess.run(
            [oracle_program("qemu-img"), "create", "-q", "-f", name, "-b", f"a.{name}", "-F", name, layer.name],
            cwd=folder,
            check=True,
        )
        qemu_io(layer, "write -P 9 1M 128k", format_name=name)
    qemu_img("convert", "-c", "-O", "qcow2", raw, folder / "small.qcow2")
    qemu_img("convert", "-O", "qcow2", raw, folder / "kept.qcow2")
    for name in ("qcow2", "qed"):
        qemu_img("convert", "-O", name, raw, folder / f"free.{name}")
    qemu_img("snapshot", "-c", "one", folder / "kept.qcow2")
    qemu_img("bitmap", "--add", folder / "kept.qcow2", "b0")
    (folder / "other.raw").write_bytes(raw.read_bytes()[:-70_000] + b"x" * 70_000)
    (folder / "short.raw").write_bytes(raw.read_bytes()[: 6 << 20])
    yield folder
    shutil.rmtree(folder)


def copied(folder: Path, target: Path) -> Path:
    """Copies a directory, holes and times included."""
    subprocess.run(["cp", "-a", "--reflink=always", folder, target], check=True)
    return target


@pytest.fixture
def images(prepared: Path, xfs_dir: Path) -> Path:
    """Images that the test may change."""
    return copied(prepared, xfs_dir / "ours")


def without_progress(text: str) -> str:
    """Returns what is printed without the progress before its last line."""
    return re.sub(r"(    \([0-9.]+/100%\)\r)+", "(progress)", text)


class Answer(NamedTuple):
    """What a program says."""

    code: int
    out: str
    err: str


def ours(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Answer | str:
    """Returns the answer of the front end in this process, or its reason to hand the command over."""
    reasons = []

    def hand_over(_arguments: list[str], reason: str, code: int = 1) -> int:
        reasons.append(reason)
        return code

    monkeypatch.setattr(front, "hand_over", hand_over)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    code = front.main(arguments)
    said = capsys.readouterr()
    return reasons[0] if reasons else Answer(code, without_progress(said.out), said.err)


def theirs(folder: Path, arguments: list[str]) -> Answer:
    done = subprocess.run([oracle_program("qemu-img"), *arguments], cwd=folder, capture_output=True, check=False)
    return Answer(done.returncode, without_progress(done.stdout.decode()), done.stderr.decode())


LOOKS = [
    *(f"info {layout} a.{name}" for name in FORMATS for layout in ("", "--output=json")),
    *(f"info -f {name} a.{name}" for name in ("vpc", "qcow2")),
    *(
        f"info {layout} --backing-chain top.{name}"
        for name in ("qcow2", "qed", "vmdk")
        for layout in ("", "--output json")
    ),
    "info -U --output=json kept.qcow2",
    "info kept.qcow2",
    "snapshot -l kept.qcow2",
    "snapshot -l a.qcow2",
    *(f"map {layout} a.{name}" for name in ("qcow2", "vmdk", "qed", "vdi") for layout in ("", "--output=json")),
    "map --output=json -f raw short.raw",
    "map top.qcow2",
    "map --output=json top.qcow2",
    "map --output=json small.qcow2",
    "map --output json -s 1M -l 4M a.qcow2",
    "map --start-offset=5M a.qcow2",
    *(f"compare a.raw a.{name}" for name in FORMATS[1:]),
    "compare -f raw -F qcow2 a.raw top.qcow2",
    "compare a.raw other.raw",
    "compare other.raw a.qcow2",
    "compare -q other.raw a.qcow2",
    "compare a.raw short.raw",
    "compare short.raw a.qcow2",
    "compare a.raw other.raw -p",
    "compare -p a.raw a.qcow2",
]


@pytest.mark.parametrize("line", LOOKS)
def test_an_answer_is_qemus_to_the_letter(
    line: str, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    got, want = ours(prepared, line.split(), monkeypatch, capsys), theirs(prepared, line.split())
    assert got == want, f"{got}\n{want}"


MAKES = [
    *(f"create -f {name} new 64M" for name in FORMATS),
    "create -f qcow2 -o cluster_size=128k,lazy_refcounts=on,refcount_bits=8 new 1G",
    "create -f qcow2 -o compat=0.10 new 10M",
    "create -f qcow2 -o compat=v3,extended_l2=on,compression_type=zstd new 10M",
    "create -f qcow2 -o preallocation=metadata new 10M",
    "create -q -f qcow2 new 10M",
    "create -f qcow2 -b a.qcow2 -F qcow2 new",
    "create -f qcow2 -b a.raw -F raw new 100M",
    "create -f qed -b a.raw -F raw new",
    "create -f qed -o cluster_size=128k,table_size=8 new 10M",
    "create -f vhdx -o block_size=1M,log_size=2M new 10M",
    "create -f vhdx -o subformat=fixed new 10M",
    "create -f vpc -o subformat=fixed,force_size=on new 10M",
    "create -f vdi -o static=on new 10M",
    "create -f vmdk -o adapter_type=lsilogic,zeroed_grain=on new 10M",
    "create -f raw -o preallocation=falloc new 1M",
    "create -f qcow2 a.vdi 5M",
    *(f"convert -O {name} a.qcow2 new" for name in FORMATS),
    *(f"convert -f {name} -O qcow2 a.{name} new" for name in FORMATS if name not in ("vdi", "vpc")),
    "convert -O qcow2 top.qcow2 new",
    "convert -p -O qcow2 a.raw new",
    "convert -O qcow2 a.raw a.vdi",
    "convert a.vhdx new",
    "convert -O qcow2 -o cluster_size=4k -W -m 4 -t none -T none a.raw new",
    "convert -O vhdx -t writeback a.raw new",
    "convert -C -O qcow2 a.raw new",
    "convert -O qcow2 -B a.qcow2 -F qcow2 top.qcow2 new",
    "convert -O qcow2 -l snapshot.name=one kept.qcow2 new",
    "convert -O qcow2 --bitmaps kept.qcow2 new",
    "convert -c -O qcow2 a.raw new",
    "convert -c -O qcow2 -o compression_type=zstd a.raw new",
    "convert -O qcow2 a.raw short.raw new",
]


@pytest.mark.parametrize("line", MAKES)
def test_an_image_has_the_disk_of_qemus(
    line: str, images: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    made, other = both(line, images, monkeypatch, capsys)
    target = next(word for word in ("new", "a.vdi") if word in line.split())
    name = (
        line.split("-O ")[1].split(maxsplit=1)[0]
        if "-O " in line
        else line.split("-f ")[1].split(maxsplit=1)[0]
        if "-f " in line
        else "raw"
    )
    qemu_img("compare", "-f", name, "-F", name, made / target, other / target)
    sizes = [re.findall(r"\d+", facts(folder / target, name, qemu_img, "virtual-size"))[0] for folder in (made, other)]
    assert sizes[0] == sizes[1]
    assert (made / target).stat().st_mode == (other / target).stat().st_mode


def facts(path: Path, name: str, qemu_img: QemuImg, key: str) -> str:
    text = qemu_img("info", "-U", "-f", name, "--output=json", path).stdout
    return next(line for line in text.splitlines() if f'"{key}"' in line)


def both(line: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> tuple[Path, Path]:
    """Runs the command on two equal directories, by both programs; the answers have to be the same."""
    other = images.with_name("theirs")
    copied(images, other)
    assert ours(images, line.split(), monkeypatch, capsys) == theirs(other, line.split())
    return images, other


CHANGES = [
    "resize free.qcow2 16M",
    "resize -q -f raw a.raw 9M",
    "resize --preallocation=full -f raw a.raw 9M",
    "resize --preallocation=falloc -f raw a.raw +1M",
    "resize --shrink -f qcow2 free.qcow2 -5M",
    "resize -f qed free.qed 1G",
    "snapshot -c two kept.qcow2",
    "snapshot -d one kept.qcow2",
    "rebase -u -f qcow2 -b kept.qcow2 -F qcow2 top.qcow2",
    "rebase -p -u -b kept.qcow2 -F qcow2 top.qcow2",
    "rebase -b kept.qcow2 -F qcow2 top.qcow2",
    "rebase -f qcow2 -b '' top.qcow2",
    "commit -f qcow2 top.qcow2",
    "commit -q top.qcow2",
    "commit -d top.qcow2",
    "bitmap --add kept.qcow2 b1",
    "bitmap --add -g 128k --disable kept.qcow2 b1",
    "bitmap --remove kept.qcow2 b0",
    "bitmap --clear -f qcow2 kept.qcow2 b0",
]


@pytest.mark.parametrize("line", CHANGES)
def test_a_changed_image_is_the_one_that_qemu_makes(
    line: str, images: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    other = images.with_name("theirs")
    copied(images, other)
    assert ours(images, shlex.split(line), monkeypatch, capsys) == theirs(other, shlex.split(line))
    for path in sorted(other.iterdir()):
        if path.suffix == ".raw":
            name = "raw"
        else:
            name = path.suffix[1:]
            qemu_img("check", "-q", images / path.name, ok=(0, 63))
        qemu_img("compare", "-f", name, "-F", name, images / path.name, path)
        for key in ("virtual-size", "backing-filename", "backing-filename-format", "name"):
            described = [keys(folder / path.name, name, qemu_img, key) for folder in (images, other)]
            assert described[0] == described[1]


def keys(path: Path, name: str, qemu_img: QemuImg, key: str) -> list[str]:
    text = qemu_img("info", "-U", "-f", name, "--output=json", path).stdout
    return [line for line in text.splitlines() if f'"{key}"' in line]


def test_skipped_bitmaps_are_named(
    images: Path, xfs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert theirs(images, ["bitmap", "--add", "kept.qcow2", "a1"]).code == 0
    # A killed QEMU leaves bitmaps in use.
    subprocess.run([oracle_program("qemu-io"), "-c", "abort", images / "kept.qcow2"], capture_output=True, check=False)
    other = copied(images, xfs_dir / "theirs")
    line = ["convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", "kept.qcow2", "new"]
    got, want = ours(images, line, monkeypatch, capsys), theirs(other, line)
    assert got == want, f"{got}\n{want}"
    assert want.err.count("warning: Skipping inconsistent bitmap") == 2


@pytest.mark.parametrize("line", ["info kept.qcow2", "info --output=json kept.qcow2", "snapshot -l kept.qcow2"])
def test_a_snapshot_with_a_zero_byte_in_its_name_is_handed_over(
    line: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = images / "kept.qcow2"
    data = path.read_bytes()
    at = int.from_bytes(data[64:72], "big")
    name = data.index(b"one", at)
    path.write_bytes(data[:name] + b"o\0e" + data[name + 3 :])
    reason = ours(images, line.split(), monkeypatch, capsys)
    assert isinstance(reason, str)
    assert "name has a zero byte" in reason


HANDED = [
    "",
    "--version",
    "amend -f qcow2 -o compat=0.10 a.qcow2",
    "bench a.raw",
    "dd if=a.raw of=new",
    "check a.qcow2",
    "measure -O qcow2 a.raw",
    "convert -S 4k a.raw new",
    "convert -n -O qcow2 a.raw a.qcow2",
    "convert --image-opts driver=raw,file.filename=a.raw new",
    "convert --object secret,id=x,data=y a.raw new",
    "convert --salvage a.raw new",
    "convert nbd://localhost/x new",
    "convert json:{} new",
    "convert a.raw nbd:unix:/x",
    "convert -O vhd a.raw new",
    "convert -O qcow2 -o data_file=x a.raw new",
    "convert -O qcow2 -o help",
    "convert -m 0 a.raw new",
    "convert a.raw /dev/null",
    "convert missing new",
    "info missing",
    "info --out json a.raw",
    "info blkdebug::a.raw",
    "create -f qcow2 -u -b none -F raw new 1M",
    "create -f qcow2 -b a.raw new",
    "create -f qcow2 -o encryption=on new 1M",
    "create -f raw new 1.5G",
    "create -f raw new 1000",
    "compare -s a.raw a.qcow2",
    "map small.qcow2",
    "resize a.raw 9M",
    "resize -f qcow2 a.qcow2 1M",
    "resize --preallocation=metadata -f raw a.raw 9M",
    "resize --preallocation=full --shrink -f raw a.raw 7M",
    "resize --preallocation=falloc -f qcow2 free.qcow2 16M",
    "commit a.raw",
    "commit -b a.qcow2 top.qcow2",
    "rebase -b a.raw top.qcow2",
    "snapshot -a one kept.qcow2",
    "snapshot -d none kept.qcow2",
    "map a.vhdx",
    "resize a.qed 1G",
    "bitmap --add kept.qcow2 b0",
    "bitmap --merge b0 -b a.qcow2 kept.qcow2 b0",
]


@pytest.mark.parametrize("line", HANDED)
def test_what_only_qemu_knows_is_handed_over_untouched(
    line: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    assert isinstance(ours(images, line.split(), monkeypatch, capsys), str)
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    assert handing.find() is not None
