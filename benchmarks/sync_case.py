"""The case of a sync: an image is brought up to date with a disk of which 1 % has changed, in pieces of 64 KiB."""

from __future__ import annotations

import os
import random

from bench import VMCONV, Bench, python, vmconv
from correct import same_as
from images import Filesystem, Place, command
from measure import Contender, Measured, side_by_side
from report import print_measured

_PIECE = 64 << 10
_MIB = 1 << 20


def sync(bench: Bench, place: Place) -> None:
    """Where blocks can be shared; and from ext4 to another filesystem, which shares blocks or does not."""
    if place.kind == "ext4":
        for kind in ("xfs", "ext4"):
            for size in (bench.size, 8 * bench.size):
                _across(bench, place, kind, size)
        return
    old = bench.random(place)
    with place.scratch("changed.raw", "target.qcow2") as (changed, target):
        command("cp", "--reflink=always", old, changed)
        _change(changed, bench.size)
        check = same_as(changed, "raw", "qcow2")
        made = [VMCONV, "convert", "-q", old, target]
        measured = bench.measure(
            "sync",
            place,
            f"qcow2 of {bench.size >> 30} GiB, 1 % changed in pieces of 64 KiB",
            [
                Contender("vmconv sync", [VMCONV, "sync", "-q", changed, target], target, check=check, before=made),
                vmconv(changed, target, check=check),
            ],
        )
    ratio = measured.median("vmconv sync") / measured.median("vmconv")
    bench.at_most(measured, "sync, relative to a full conversion", ratio, 2, "x")
    bench.at_most(measured, "a sync: bytes read", measured.median("vmconv sync", "rchar") / _MIB, 24, "MiB")


def _changed_pieces(size: int) -> list[int]:
    """Returns the offsets of 1 % of the pieces of a disk, sorted."""
    return sorted(random.Random(size).sample(range(0, size, _PIECE), max(1, size // _PIECE // 100)))


def _change(path: str, size: int) -> None:
    with open(path, "r+b") as file:
        for offset in _changed_pieces(size):
            os.pwrite(file.fileno(), os.urandom(_PIECE), offset)
        os.fsync(file.fileno())


def _across(bench: Bench, place: Place, kind: str, size: int) -> None:
    """An external snapshot of an empty disk on ext4; the disk's image is on another filesystem.

    The copy is of the snapshot's file, which has the same payload. It is durable with its name, as the image is, and
    a process of the same interpreter.
    """
    other = os.path.join(bench.work, f"sync-{kind}")
    os.mkdir(other)
    with (
        Filesystem(kind, other, size // 16 + (4 << 30)) as there,
        there.scratch("target.qcow2", "copy") as (target, copy),
        place.scratch("base.raw", "top.qcow2") as (base, top),
    ):
        with open(base, "wb") as file:
            file.truncate(size)
        _layer(top, base, size)

        def settle() -> None:
            # Else the file behind the filesystem would keep what earlier runs wrote.
            command("fstrim", there.directory)
            place.settle()
            there.settle()

        made, synced = ([VMCONV, "sync", "-q", source, target] for source in (base, top))
        both = ["sh", "-c", '"$0" sync -q "$1" "$3" && "$0" sync -q "$2" "$3"', VMCONV, base, top, target]
        measured = side_by_side(
            Measured("sync", place.kind, f"qcow2 of {size >> 30} GiB on another {kind}, 1 % in a new layer"),
            [
                Contender("vmconv sync", synced, target, check=same_as(top, "qcow2", "qcow2"), before=made),
                # Nothing has changed: what a sync costs before it moves a byte.
                Contender("the same again", synced, target, before=both),
                python("copying the same bytes", "child_copy.py", top, copy, target=copy),
            ],
            bench.runs,
            settle,
        )
        print_measured(measured)
        bench.results.append(measured)
    os.rmdir(other)
    one, nothing, copied = (
        measured.median(each) for each in ("vmconv sync", "the same again", "copying the same bytes")
    )
    what = f"a sync of {size >> 30} GiB to {kind}"
    # Of a small change, the fixed cost is more than all the rest.
    if size > bench.size:
        bench.at_most(measured, f"{what}, in copies of the same bytes", one / copied, 1.2, "x")
    bench.at_most(measured, f"{what}: its fixed cost", nothing, 0.3)
    bench.at_most(measured, f"{what} beyond its fixed cost, in such copies", (one - nothing) / copied, 1.2, "x")
    written = measured.median("vmconv sync", "wchar") / measured.median("copying the same bytes", "wchar")
    bench.at_most(measured, f"{what}: bytes written, in those of the copy", written, 1.2, "x")


def _layer(top: str, below: str, size: int) -> None:
    """Makes a layer with the pieces, written by QEMU."""
    command("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", below.rpartition(".")[2], top)
    words = [f"write -q -P {number % 255 + 1} {offset} {_PIECE}" for number, offset in enumerate(_changed_pieces(size))]
    command("qemu-io", *(word for each in words for word in ("-c", each)), top)
