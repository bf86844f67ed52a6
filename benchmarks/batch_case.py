"""Many small disks at once, beside a loop of the shell over one command for each."""

from __future__ import annotations

import os
from collections.abc import Callable

from bench import VMCONV, Bench
from correct import same_as
from images import Place
from measure import Contender

_DISKS = 200


def batch(bench: Bench, place: Place) -> None:
    """Two hundred disks of 64 MiB, each with 1 MiB of payload, to qcow2."""
    names = [f"disk{number:03}.raw" for number in range(_DISKS)]
    with place.scratch(*names) as disks, place.scratch("converted") as (target,):
        for disk in disks:
            _disk(disk)
        batch = [VMCONV, "convert", "-q", "-O", "qcow2", "--directory", target]
        measured = bench.measure(
            "batch",
            place,
            f"{_DISKS} raw disks of 64 MiB to qcow2",
            [
                Contender("vmconv --directory", [*batch, *disks], target, check=_each(disks)),
                Contender("vmconv --jobs 4", [*batch, "--jobs", "4", *disks], target, check=_each(disks)),
                _loop("a loop of vmconv", f"{VMCONV} convert -q", disks, target, durable=True),
                _loop("a loop of qemu-img", "qemu-img convert -f raw -O qcow2", disks, target, durable=False),
            ],
            2,
        )
    bench.at_most(measured, "200 disks: processor time", measured.median("vmconv --directory", "processor"), 5)


def _loop(name: str, command: str, disks: list[str], target: str, *, durable: bool) -> Contender:
    one = f'{command} "$disk" {target}/$(basename "$disk" .raw).qcow2'
    script = f'mkdir {target}; for disk in "$@"; do {one} || exit 1; done'
    return Contender(name, ["sh", "-c", script, "sh", *disks], target, durable=durable, heavy=True)


def _disk(path: str) -> None:
    with open(path, "wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(64 << 20)


def _each(disks: list[str]) -> Callable[[str], None]:
    """Returns a check of the first and the last of the targets in a directory."""

    def check(target: str) -> None:
        for disk in (disks[0], disks[-1]):
            stem = os.path.basename(disk).removesuffix(".raw")
            same_as(disk, "raw", "qcow2")(os.path.join(target, f"{stem}.qcow2"))

    return check
