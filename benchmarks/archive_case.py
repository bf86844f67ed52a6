"""The case of archives: a Proxmox VE archive, plain and compressed, restored as a machine of another platform."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable

from bench import VMCONV, Bench
from images import Place, command, random_raw
from measure import Contender

_CHILD = os.path.join(os.path.dirname(__file__), "child_vma.py")


def archives(bench: Bench, place: Place) -> None:
    """A backup for VMware and libvirt, beside extracting its disk and converting that, as people do today."""
    # A quarter: up to five copies of the disk are there at once, and none of them shares blocks on ext4.
    length = bench.size // 4
    with place.scratch("web.raw", "web.vma", "web.vma.zst", "disk.raw", "disk.out") as (raw, plain, packed, disk, out):
        random_raw(raw, length)
        command(sys.executable, _CHILD, "create", raw, plain)
        command("zstd", "-q", "-1", "-o", packed, plain)
        size = f"{length >> 20} MiB"
        for archive, first, kind in (
            (plain, f"{shlex.quote(sys.executable)} {_CHILD} extract {plain} {disk}", "VMA"),
            (packed, f"zstd -q -d -c {packed} | {shlex.quote(sys.executable)} {_CHILD} extract - {disk}", "VMA, zstd"),
        ):
            measured = bench.measure(
                "archives",
                place,
                f"{kind} with a disk of {size}",
                [
                    _machine(place, "vmx", "vmdk", archive, raw),
                    _machine(place, "libvirt", "qcow2", archive, raw),
                    *(_today(first, disk, out, one) for one in ("vmdk", "qcow2")),
                ],
            )
            text = f"{kind} of {size} to qcow2: as a part of extracting and qemu-img"
            ratio = measured.median("vmconv to libvirt") / measured.median("extract, qemu-img to qcow2")
            bench.at_most(measured, text, ratio, 0.6, "x")
    for name in ("vmx", "libvirt"):
        shutil.rmtree(place.path(f"made-{name}"), ignore_errors=True)


def _machine(place: Place, target: str, suffix: str, archive: str, raw: str) -> Contender:
    made = place.path(f"made-{target}")
    return Contender(
        f"vmconv to {target}",
        [VMCONV, "machine", "convert", "-q", "--force", "-O", target, archive, f"{made}/"],
        made,
        check=_same(raw, made, suffix),
    )


def _same(raw: str, made: str, suffix: str) -> Callable[[str], None]:
    def check(_target: str) -> None:
        names = [name for name in os.listdir(made) if name.endswith(f".{suffix}")]
        command("qemu-img", "compare", "-q", raw, os.path.join(made, names[0]))

    return check


def _today(first: str, disk: str, out: str, target: str) -> Contender:
    program = f"{first} && qemu-img convert -W -m 16 -O {target} {disk} {out} && rm {disk}"
    return Contender(f"extract, qemu-img to {target}", ["sh", "-c", program], out, heavy=True)
