"""A small Linux guest, made from Debian packages: a kernel, busybox and a bootloader on a disk, and what QEMU runs.

    0         syslinux' boot record, and a partition table
    1 MiB     FAT: the bootloader, the kernel, an initramfs with busybox and the script that runs first
    49 MiB    ext4: a file of random payload, and what the guest writes

`INIT` mounts the second partition of each disk, takes the sum of the payload, writes it with a token of its own making,
and powers off. It says both on the serial port too, behind the serial number of the disk.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.disks import MIB

SECTOR = 512
FAT, DATA, SIZE = MIB, 49 * MIB, 128 * MIB
BOOT_RECORD = Path("/usr/lib/SYSLINUX/mbr.bin")
BUSYBOX = Path("/bin/busybox")
PROGRAMS = ("qemu-system-x86_64", "syslinux", "mformat", "mcopy", "mke2fs", "e2fsck", "debugfs", "cpio")
TIMEOUT = 600
"""Seconds that a guest may take; it takes about four where nothing else runs."""

INIT = """#!/bin/busybox sh
for applet in mount umount sha256sum cat tee sync poweroff; do /bin/busybox ln -s busybox /bin/$applet; done
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for disk in /sys/class/nvme/nvme*; do
    mount -t ext4 /dev/${disk##*/}n1p2 /mnt
    echo "disk $(cat $disk/serial)"
    echo "token $(cat /proc/sys/kernel/random/uuid)" | tee /mnt/answer
    echo "payload $(sha256sum < /mnt/payload)" | tee -a /mnt/answer
    sync
    umount /mnt
done
poweroff -f
"""

# Linux 6.1 tests the timer by waiting, and panics where a busy machine lets it wait too long: no_timer_check.
ARGUMENTS = "console=ttyS0 quiet panic=-1 no_timer_check"

CONFIG = f"""DEFAULT linux
LABEL linux
  KERNEL vmlinuz
  INITRD initrd
  APPEND {ARGUMENTS}
"""


def kernels() -> list[Path]:
    """Returns the kernels that need no module for this guest's disk and filesystem: Debian's for clouds."""
    return sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"))


def what_is_missing() -> str | None:
    """Returns what a guest cannot be made without, or None when all is there."""
    for program in PROGRAMS:
        if not shutil.which(program):
            return f"{program} is not installed"
    if not BOOT_RECORD.exists():
        return f"{BOOT_RECORD} is not there (syslinux)"
    if not BUSYBOX.exists() or b"ld-linux" in BUSYBOX.read_bytes()[:4096]:
        return f"{BUSYBOX} is not there as one static program (busybox-static)"
    return None if kernels() else "no kernel for clouds in /boot (linux-image-cloud-amd64)"


def run(*command: str | Path) -> str:
    """Returns what a program printed; a program that fails fails the test, with its words."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def make_guest(
    directory: Path, init: str = INIT, modules: Sequence[str] = (), fill: Callable[[Path], None] | None = None
) -> tuple[Path, str]:
    """Returns a raw disk that boots, made in an empty directory, and the sha256 of the payload in it.

    `init` runs first in the guest, which has the kernel's `modules`. `fill` may add files to the directory that becomes
    the first partition.
    """
    disk = directory / "guest.raw"
    disk.write_bytes(_boot_record())
    os.truncate(disk, SIZE)
    boot_files = directory / "boot"
    boot_files.mkdir()
    (boot_files / "syslinux.cfg").write_text(CONFIG)
    (boot_files / "initrd").write_bytes(_initramfs(directory / "root", init, modules))
    shutil.copy(kernels()[-1], boot_files / "vmlinuz")
    if fill is not None:
        fill(boot_files)
    _fill_boot_partition(disk, boot_files)
    files = directory / "files"
    files.mkdir()
    payload = os.urandom(4 * MIB)
    (files / "payload").write_bytes(payload)
    # mke2fs would count the space up to the end of the file as its own without a size.
    run("mke2fs", "-q", "-t", "ext4", "-d", files, "-E", f"offset={DATA}", disk, f"{(SIZE - DATA) // MIB}M")
    return disk, hashlib.sha256(payload).hexdigest()


def _boot_record() -> bytes:
    def entry(flag: int, kind: int, start: int, end: int) -> bytes:
        first, count = start // SECTOR, (end - start) // SECTOR
        return struct.pack("<B3sB3sII", flag, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", first, count)

    table = entry(0x80, 0x0E, FAT, DATA) + entry(0, 0x83, DATA, SIZE)
    return BOOT_RECORD.read_bytes().ljust(446, b"\0") + table.ljust(64, b"\0") + b"\x55\xaa"


def _fill_boot_partition(disk: Path, files: Path) -> None:
    partition = f"{disk}@@{FAT}"
    sectors, hidden = (DATA - FAT) // SECTOR, FAT // SECTOR
    run("mformat", "-i", partition, "-T", str(sectors), "-h", "16", "-s", "63", "-H", str(hidden), "::")
    run("syslinux", "--install", "--offset", str(FAT), disk)
    run("mcopy", "-s", "-i", partition, *sorted(files.iterdir()), "::")


def _initramfs(root: Path, init: str, modules: Sequence[str]) -> bytes:
    for name in ("bin", "dev", "proc", "sys", "mnt"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    (root / "init").write_text(init)
    (root / "init").chmod(0o755)
    if modules:
        _copy_modules(root, modules)
    names = "\0".join([".", *(str(path.relative_to(root)) for path in root.rglob("*"))])
    command = ["cpio", "--create", "--format=newc", "--quiet", "--null", "--owner=0:0"]
    packed = subprocess.run(command, input=names.encode(), cwd=root, capture_output=True, check=True).stdout
    return gzip.compress(packed, 1)


def _copy_modules(root: Path, modules: Sequence[str]) -> None:
    """Copies modules of the kernel with all that they need, and the list that modprobe reads."""
    version = kernels()[-1].name.removeprefix("vmlinuz-")
    source, target = Path("/lib/modules", version), root / "lib/modules" / version
    needed = [line for line in (source / "modules.dep").read_text().splitlines() if _module(line) in modules]
    assert {*map(_module, needed)} == {*modules}, needed
    for file in {file for line in needed for file in line.replace(":", "").split()}:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, target / file)
    shutil.copy(source / "modules.dep", target)


def _module(line: str) -> str:
    return Path(line.split(":", maxsplit=1)[0]).name.split(".")[0]


def boot(images: Sequence[Path | str], qemu_format: str, options: Mapping[Any, str] | None = None) -> str:
    """Returns what a guest said that booted from the first of its disks and powered off.

    The serial number of each disk is its index. An image may be at a URL. `options` are more options of QEMU's drive,
    by image. QEMU must have nothing to complain of.
    """
    # The guest's clock counts its instructions. Otherwise guests panic or hang on a busy machine (QEMU 7.2, load 15).
    command = ["qemu-system-x86_64", "-icount", "shift=auto", "-accel", "tcg", "-m", "256", "-nodefaults"]
    command += ["-display", "none", "-no-reboot", "-serial", "stdio"]
    for number, image in enumerate(images):
        drive = [f"file={image}", f"format={qemu_format}", "if=none", f"id=disk{number}"]
        more = (options or {}).get(image)
        command += ["-drive", ",".join([*drive, *([more] if more else [])])]
        command += ["-device", f"nvme,drive=disk{number},serial={number},bootindex={number}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def answer_on(raw: Path) -> str:
    """Returns what the guest wrote on a raw disk, whose filesystem must be sound."""
    run("e2fsck", "-fn", f"{raw}?offset={DATA}")
    return run("debugfs", "-R", "cat /answer", f"{raw}?offset={DATA}")
