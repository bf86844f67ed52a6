"""The case of machines: a configuration and three disks, for another hypervisor and into a package."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

from bench import VMCONV, Bench
from images import GIB, Place, command
from measure import Contender, Measured

_DISKS = 3

_VMX = """.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
displayName = "web"
guestOS = "debian12-64"
memsize = "2048"
numvcpus = "2"
firmware = "efi"
uuid.bios = "42 1f 24 5c 7f a8 60 fa-11 22 33 44 55 66 77 88"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.addressType = "static"
ethernet0.address = "00:50:56:01:02:03"
"""


def machines(bench: Bench, place: Place) -> None:
    """A machine from VMware for libvirt, and as an OVA: what it costs besides starting Python."""
    raw = bench.random(place)
    names = [f"disk{number}.vmdk" for number in range(_DISKS)]
    with place.scratch(*names, "web.vmx", "web.ova") as (*disks, config, package):
        for disk in disks:
            command(VMCONV, "convert", "-q", raw, disk)
        _configuration(config, disks)
        made = place.path("made")
        contenders = [
            _machine("vmconv to libvirt", ["-O", "libvirt", config, made], made, _all_shared(disks, made)),
            _machine("vmconv to OVA", [config, package], package),
            Contender("import numpy", [sys.executable, "-c", "import numpy"]),
            _copies(disks, place.path("copies")),
        ]
        title = f"VMX with {_DISKS} disks of {bench.size >> 30} GiB"
        measured = bench.measure("machines", place, title, [*contenders, *_virt_v2v(config)])
        for name in ("vmconv to libvirt", "vmconv to OVA"):
            _expect(bench, measured, title, name)
    shutil.rmtree(made, ignore_errors=True)


def machines_in_place(bench: Bench, place: Place) -> None:
    """The same machine where nothing can be shared: its own disks become the new ones, and are turned back."""
    raw = bench.random(place)
    # The disks and their copies have to fit beside the raw disk.
    size = bench.size // 8
    old = place.path("old")
    os.makedirs(old)
    try:
        small = os.path.join(old, "small.raw")
        command("sh", "-c", f"head -c {size} {raw} > {small}")
        disks = [os.path.join(old, f"disk{number}.vmdk") for number in range(_DISKS)]
        for disk in disks:
            command(VMCONV, "convert", "-q", small, disk)
        os.unlink(small)
        config = os.path.join(old, "web.vmx")
        _configuration(config, disks)
        new = [os.path.join(old, f"web-disk{number}.qcow2") for number in range(1, _DISKS + 1)]
        back = " && ".join([*(f"{VMCONV} undo {each} >/dev/null" for each in reversed(new)), f"rm {old}/web.xml"])
        arguments = ["--in-place", "--keep-undo", "-O", "libvirt", config, old]
        converted = _machine("vmconv in place", arguments, new[0], back=["sh", "-c", back])
        copies = _copies(disks, place.path("copies"), "auto", heavy=True)
        title = f"VMX with {_DISKS} disks of {size / GIB:.3g} GiB to libvirt"
        numpy = Contender("import numpy", [sys.executable, "-c", "import numpy"])
        measured = bench.measure("machines", place, title, [converted, numpy, copies])
        written = measured.median("vmconv in place", "wchar") / (1 << 20)
        bench.at_most(measured, f"{title}, in place: bytes written", written, 16, "MiB")
        bench.at_least(measured, f"{title}, in place: 5 times faster than copying", "vmconv in place", copies.name, 5)
    finally:
        shutil.rmtree(old)
        shutil.rmtree(place.path("copies"), ignore_errors=True)
        place.settle()


def _configuration(path: str, disks: list[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(_VMX)
        for number, disk in enumerate(disks):
            file.write(f'scsi0:{number}.present = "TRUE"\n')
            file.write(f'scsi0:{number}.fileName = "{os.path.basename(disk)}"\n')


def _machine(
    name: str,
    arguments: list[str],
    target: str,
    check: Callable[[str], None] | None = None,
    back: list[str] | None = None,
) -> Contender:
    return Contender(name, [VMCONV, "machine", "convert", "-q", *arguments], target, check=check, back=back)


def _all_shared(disks: list[str], made: str) -> Callable[[str], None]:
    """Returns a check that no payload of the new machine was copied."""

    def check(_target: str) -> None:
        for number, disk in enumerate(disks, 1):
            command(VMCONV, "prove", disk, os.path.join(made, f"web-disk{number}.qcow2"))

    return check


def _copies(disks: list[str], directory: str, reflink: str = "always", *, heavy: bool = False) -> Contender:
    os.makedirs(directory, exist_ok=True)
    name = "cp --reflink" if reflink == "always" else "cp"
    return Contender(name, ["cp", f"--reflink={reflink}", *disks, directory], durable=False, heavy=heavy)


def _virt_v2v(config: str) -> list[Contender]:
    """Returns virt-v2v where it is installed. It only reads the configuration: converting needs a guest to repair."""
    program = shutil.which("virt-v2v")
    if program is None:
        return []
    return [Contender("virt-v2v --print-source", [program, "-i", "vmx", config, "--print-source"], heavy=True)]


def _expect(bench: Bench, measured: Measured, title: str, name: str) -> None:
    ratio = measured.median(name) / measured.median("import numpy")
    bench.at_most(measured, f"{title}, {name}: as a multiple of importing numpy", ratio, 5, "x")
    bench.at_most(measured, f"{title}, {name}: the aim", ratio, 3, "x")
    bench.at_most(measured, f"{title}, {name}: bytes written", measured.median(name, "wchar") / (1 << 20), 16, "MiB")
