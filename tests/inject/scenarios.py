"""What is run with failing calls: commands on small images, what they make, and what must stay as it is."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
SIZE = 3 * MIB + 512
"""An odd end: its last block is shared or copied by itself."""

Main = Callable[[Path], int]


class Scenario(NamedTuple):
    """`build` makes the images in an empty directory; `argv` is run, with `{}` for that directory, or else `main`.

    `targets` are what is made, by name, with QEMU's name of the format; `kept` must stay as they are. `kind` says what
    is right when the run fails: see `judge.py`. `before` is called in the process that runs it.
    """

    name: str
    build: Callable[[Path], None]
    argv: tuple[str, ...] = ()
    targets: dict[str, str] = {}  # noqa: RUF012 never changed
    kept: tuple[str, ...] = ("d.raw",)
    kind: str = "make"
    before: Callable[[], None] = lambda: None
    main: Main | None = None
    pipe: bool = False
    shown: tuple[int, ...] = (0,)
    """Exit codes that are answers, of commands that only ask."""
    answers: Callable[[bytes, bytes], bool] = bytes.__eq__
    """Whether an answer is right beside the usual one."""


def content() -> bytes:
    """Returns the disk: payload long enough to be written past the page cache, holes, and short payload at its end."""
    import random

    rng = random.Random(11)
    data = bytearray(SIZE)
    for start, length in ((0, MIB + 8192), (2 * MIB, 65536), (2 * MIB + 256 * 1024, 4096), (SIZE - 1536, 1536)):
        data[start : start + length] = rng.randbytes(length)
    return bytes(data)


def write_sparse(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), 4096):
            piece = data[at : at + 4096]
            if piece.strip(b"\0"):
                file.seek(at)
                file.write(piece)


def _qemu(*arguments: str | Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, env=environment, stdout=subprocess.DEVNULL)


def _vmconv(*arguments: str | Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run([sys.executable, "-m", "vmconv", *map(str, arguments)], check=True, env=environment)


def raw(at: Path) -> None:
    write_sparse(at / "d.raw", content())


def raw_and_old(at: Path) -> None:
    raw(at)
    _qemu("create", "-q", "-f", "qcow2", at / "o.qcow2", "1M")


def compressed(at: Path) -> None:
    raw(at)
    _qemu("convert", "-c", "-O", "qcow2", at / "d.raw", at / "d.qcow2")


def chain(at: Path) -> None:
    raw(at)
    _qemu("convert", "-O", "qcow2", at / "d.raw", at / "base.qcow2")
    _qemu("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", at / "top.qcow2")


def vmdk(at: Path) -> None:
    raw(at)
    _qemu("convert", "-O", "vmdk", at / "d.raw", at / "d.vmdk")
    (at / "d.raw").unlink()


def vhdx(at: Path) -> None:
    raw(at)
    _qemu("convert", "-O", "vhdx", at / "d.raw", at / "d.vhdx")
    (at / "d.raw").unlink()


def pair(at: Path) -> None:
    raw(at)
    _vmconv("convert", "-q", at / "d.raw", at / "o.qcow2")


def qcow2_alone(at: Path) -> None:
    raw(at)
    _qemu("convert", "-O", "qcow2", at / "d.raw", at / "o.qcow2")
    (at / "d.raw").unlink()


def older(at: Path) -> None:
    data = bytearray(content())
    data[2 * MIB : 2 * MIB + 65536] = bytes(65536)
    write_sparse(at / "d.raw", bytes(data))
    _vmconv("convert", "-q", at / "d.raw", at / "o.qcow2")
    with (at / "d.raw").open("r+b") as file:
        file.seek(2 * MIB)
        file.write(content()[2 * MIB : 2 * MIB + 65536])


def unequal(at: Path) -> None:
    raw(at)
    data = bytearray(content())
    data[2 * MIB + 5] ^= 1
    write_sparse(at / "o.raw", bytes(data))


def converted_in_place(at: Path) -> None:
    raw(at)
    _vmconv("convert", "-q", "--in-place", "--keep-undo", at / "d.raw", at / "o.qcow2")


def _copies_in_the_kernel() -> None:
    from vmconv.backends import copy

    copy._COPIED_BY_THE_SERVER |= {"xfs", "ext4"}


# -- what serves


def serve(at: Path) -> int:
    """Serves the disk, reads it as a client does, and returns 0 when it is right, 1 when that was refused."""
    from vmconv.cli.main import main

    path = f"{at.parent.parent}/socket-{os.getpid()}"
    got: list[bytes | None] = []
    client = threading.Thread(target=lambda: got.append(_read_by_nbd(path, over)), daemon=True)
    over = threading.Event()
    client.start()
    code = main(["serve", "--as", "raw", "-k", path, str(at / "d.qcow2")])
    over.set()
    client.join(10)
    if not got or got[0] is None:
        return code or 1
    return 0 if got[0] == content() else 99


def _read_by_nbd(path: str, over: threading.Event) -> bytes | None:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(100)
    while True:
        try:
            client.connect(path)
            break
        except OSError:
            if over.is_set():
                return None
            time.sleep(0.005)
    try:
        return b"".join(_nbd(client))
    except (OSError, ValueError, struct.error):
        return None
    finally:
        client.close()


def _nbd(client: socket.socket) -> Iterator[bytes]:
    stream = client.makefile("rb")

    def take(count: int) -> bytes:
        data = stream.read(count)
        if len(data) < count:
            raise ValueError("the server has gone")
        return data

    take(18)
    client.sendall(struct.pack(">I", 3) + struct.pack(">8sII", b"IHAVEOPT", 1, 0))
    size, _ = struct.unpack(">QH", take(10))
    for at in range(0, size, 1 << 18):
        length = min(1 << 18, size - at)
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, at, length))
        _, error, _ = struct.unpack(">IIQ", take(16))
        if error:
            raise ValueError("refused")
        yield take(length)
    client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 7, 0, 0))


def mount(at: Path) -> int:
    """Does what libfuse asks of a mount that somebody reads; 0 when all is right, 1 when something was refused."""
    from vmconv.io.registry import installed
    from vmconv_view.fuse import Filesystem
    from vmconv_view.tree import Tree

    tree = Tree(installed(), str(at))
    filesystem = Filesystem(tree, lambda: None, others=False)
    try:
        assert "d.qcow2" in filesystem.readdir("/", 0)
        names = filesystem.readdir("/d.qcow2/raw", 0)
        if "vmconv-errors.txt" in names:
            filesystem.getattr("/d.qcow2/raw/vmconv-errors.txt")
            print("vmconv: shown as an error", file=sys.stderr)
            return 1
        path = "/d.qcow2/raw/d.raw"
        size = filesystem.getattr(path)["st_size"]
        number = filesystem.open(path, os.O_RDONLY)
        data = b"".join(filesystem.read(path, 1 << 17, offset, number) for offset in range(0, size, 1 << 17))
        filesystem.lseek(path, 0, os.SEEK_DATA, number)
        filesystem.lseek(path, 0, os.SEEK_HOLE, number)
        filesystem.release(path, number)
    except OSError as exc:
        # What the kernel tells the reader.
        print(f"vmconv: {exc.strerror}", file=sys.stderr)
        return 1
    finally:
        tree.close()
    return 0 if data == content() else 99


def _claims_no_more(out: bytes, usual: bytes) -> bool:
    """True for an answer of `prove` without a false claim."""
    rows = [line for line in out.splitlines() if line.endswith((b" same", b" NOT SHARED"))]
    return all(row in usual.splitlines() for row in rows)


def _is_coarser(out: bytes, usual: bytes) -> bool:
    """True for a map whose ranges with data hold those of the usual one: holes need not be told."""
    return all(any(_holds(row, other) for row in _ranges(out)) for other in _ranges(usual))


def _ranges(out: bytes) -> list[tuple[int, int, int]]:
    """Returns begin, end and the distance of the place in the file of each range of a map."""
    rows = [line.split() for line in out.decode().splitlines() if line.startswith("0x")]
    return [
        (int(start, 16), int(start, 16) + int(length, 16), int(place, 16) - int(start, 16))
        for start, length, place, _ in rows
    ]


def _holds(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return one[0] <= other[0] and other[1] <= one[1] and one[2] == other[2]


QCOW2 = {"o.qcow2": "qcow2"}

SCENARIOS = (
    Scenario("reflink", raw, ("convert", "-q", "{}/d.raw", "{}/o.qcow2"), QCOW2),
    Scenario("copy", raw, ("convert", "-q", "--backend", "copy", "{}/d.raw", "{}/o.qcow2"), QCOW2),
    Scenario(
        "copy-unsafe", raw, ("convert", "-q", "--backend", "copy", "-t", "unsafe", "{}/d.raw", "{}/o.qcow2"), QCOW2
    ),
    Scenario(
        "copy-kernel",
        raw,
        ("convert", "-q", "--backend", "copy", "{}/d.raw", "{}/o.qcow2"),
        QCOW2,
        before=_copies_in_the_kernel,
    ),
    Scenario("decode", compressed, ("convert", "-q", "{}/d.qcow2", "{}/o.raw"), {"o.raw": "raw"}, ("d.raw", "d.qcow2")),
    Scenario(
        "chain",
        chain,
        ("convert", "-q", "{}/top.qcow2", "{}/o.vmdk"),
        {"o.vmdk": "vmdk"},
        ("base.qcow2", "top.qcow2"),
    ),
    Scenario("force", raw_and_old, ("convert", "-q", "--force", "{}/d.raw", "{}/o.qcow2"), QCOW2, kind="replace"),
    Scenario("sync", older, ("sync", "-q", "{}/d.raw", "{}/o.qcow2"), QCOW2, kind="replace"),
    Scenario(
        "reference",
        raw,
        ("convert", "-q", "-o", "subformat=reference", "{}/d.raw", "{}/o.vmdk"),
        {"o.vmdk": "vmdk"},
    ),
    Scenario(
        "fanout",
        raw,
        ("fanout", "-q", "--to", "qcow2,vmdk,vhdx", "--directory", "{}", "{}/d.raw"),
        {"d.qcow2": "qcow2", "d.vmdk": "vmdk", "d.vhdx": "vhdx"},
    ),
    Scenario("in-place", raw, ("convert", "-q", "--in-place", "{}/d.raw", "{}/o.qcow2"), QCOW2, kind="in-place"),
    Scenario(
        "in-place-undo",
        vmdk,
        ("convert", "-q", "--in-place", "--keep-undo", "{}/d.vmdk", "{}/o.qcow2"),
        QCOW2,
        ("d.vmdk",),
        kind="in-place",
    ),
    Scenario(
        "in-place-shift",
        vhdx,
        ("convert", "-q", "--in-place", "{}/d.vhdx", "{}/o.raw"),
        {"o.raw": "raw"},
        ("d.vhdx",),
        kind="in-place",
    ),
    Scenario(
        "resize",
        qcow2_alone,
        ("resize", "-q", "--keep-undo", "{}/o.qcow2", "1G"),
        QCOW2,
        ("o.qcow2",),
        kind="in-place",
    ),
    Scenario(
        "snapshot",
        qcow2_alone,
        ("snapshot", "-q", "-c", "new", "--keep-undo", "{}/o.qcow2"),
        QCOW2,
        ("o.qcow2",),
        kind="in-place",
    ),
    Scenario("undo", converted_in_place, ("undo", "{}/o.qcow2"), {"d.raw": "raw"}, ("o.qcow2",), kind="in-place"),
    Scenario(
        "stream-file",
        raw,
        ("convert", "-q", "-O", "vmdk", "-o", "subformat=streamOptimized", "{}/d.raw", "-"),
        {"out": "vmdk"},
        kind="stream",
    ),
    Scenario(
        "stream-pipe",
        raw,
        ("convert", "-q", "-O", "qcow2", "{}/d.raw", "-"),
        {"out": "qcow2"},
        kind="stream",
        pipe=True,
    ),
    Scenario(
        "compare",
        pair,
        ("compare", "{}/d.raw", "{}/o.qcow2"),
        {},
        ("d.raw", "o.qcow2"),
        kind="ask",
        answers=lambda out, usual: out.splitlines()[:1] == usual.splitlines()[:1],
    ),
    Scenario("differ", unequal, ("compare", "{}/d.raw", "{}/o.raw"), {}, ("d.raw", "o.raw"), kind="ask", shown=(1,)),
    Scenario(
        "prove",
        pair,
        ("prove", "{}/d.raw", "{}/o.qcow2"),
        {},
        ("d.raw", "o.qcow2"),
        kind="ask",
        shown=(1,),
        answers=_claims_no_more,
    ),
    Scenario("info", chain, ("info", "{}/top.qcow2"), {}, ("base.qcow2", "top.qcow2"), kind="ask"),
    Scenario("map", chain, ("map", "{}/top.qcow2"), {}, ("base.qcow2", "top.qcow2"), kind="ask", answers=_is_coarser),
    Scenario("check", pair, ("check", "{}/o.qcow2"), {}, ("d.raw", "o.qcow2"), kind="ask"),
    Scenario("serve", compressed, kept=("d.raw", "d.qcow2"), kind="serve", main=serve),
    Scenario("mount", compressed, kept=("d.raw", "d.qcow2"), kind="serve", main=mount),
)
