"""Shows memory of a running Linux guest to `crash` and volatility3, in each format that vmconv writes. Run by hand.

    python tests/memory/with_crash.py DIRECTORY VMLINUX [--symbols ISF]

Boots Debian's kernel for clouds under QEMU, takes what QEMU writes of its memory, converts that to every format, and
compares what both programs say of a conversion with what they say of QEMU's own dump. `docs/guide/forensics.md` has the
results. VMLINUX is the kernel with debug symbols, 600 MB; ISF the kernel's symbols for volatility3, which `pakunoda`
makes of `DIRECTORY/web.ram` (a first run leaves it):

    apt-get install crash qemu-system-x86 cpio busybox-static linux-image-cloud-amd64
    apt-get download linux-image-$(...)-cloud-amd64-dbg
    dpkg-deb --fsys-tarfile linux-image-*-dbg_*.deb | tar -x --wildcards './usr/lib/debug/boot/*'
    pip install pakunoda && pakunoda extract DIRECTORY/web.ram -o linux.json
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vmconv
from support.guest import ARGUMENTS, kernels, make_guest

INIT = """#!/bin/busybox sh
for applet in mount sleep echo; do /bin/busybox ln -s busybox /bin/$applet; done
mount -t devtmpfs dev /dev
sleep 1000000 &
sleep 2000000 &
echo "vmconv was here" > /dev/kmsg
echo ready
exec sleep 3000000
"""
MEMORY = "256M"
SAID = "ready"
SOURCES = ("web.elf", "web.ram", "web.mig", "web.kdump")
"""QEMU's: an ELF core with registers, raw memory, a migration stream, a kdump file compressed by zlib."""
TARGETS = ("new.ram", "new.elf", "new.lime", "new.vmss")
COMMANDS = "set scroll off\nsys\nps\nlist -o task_struct.tasks -s task_struct.pid,comm -h init_task\nlog\nquit\n"
"""`ps` of crash 8.0.2 finds the idle task only, also in QEMU's own dump of Linux 6.1; the kernel's list has all."""
NOT_CRASH = ("new.ram", "new.lime")
"""crash 8.0.2 reads no LiME of x86-64, and raw memory only if told its base."""


def main() -> int:
    options = _options()
    folder = Path(options.directory)
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / name).exists() for name in SOURCES):
        take(folder)
    wrong = []
    wanted = crash(folder / "web.elf", options.vmlinux)
    assert "sleep" in wanted
    assert "vmconv was here" in wanted
    processes = pslist(folder / "web.elf", options.symbols) if options.symbols else None
    for source in options.sources.split(","):
        for target in options.targets.split(","):
            made = folder / target
            vmconv.convert(str(folder / source), str(made), force=True)
            if options.symbols and pslist(made, options.symbols) != processes:
                wrong.append(f"volatility3: {source} as {target}")
            if target not in NOT_CRASH and crash(made, options.vmlinux) != wanted:
                wrong.append(f"crash: {source} as {target}")
            print(f"{source} as {target}: compared", flush=True)
    print("\n".join(f"WRONG  {each}" for each in wrong) or f"all the same, {wanted.count('sleep')} of sleep among them")
    return 1 if wrong else 0


def take(folder: Path) -> None:
    """Boots a guest, and has QEMU write its memory in each way."""
    guest = folder / "guest"
    shutil.rmtree(guest, ignore_errors=True)
    guest.mkdir()
    make_guest(guest, INIT)
    serial = folder / "serial"
    with _machine(guest / "boot" / "initrd", serial) as qemu:
        while SAID not in (serial.read_text() if serial.exists() else ""):
            assert qemu.poll() is None, qemu.communicate()
            time.sleep(1)
        said = [
            "stop",
            f'dump-guest-memory "{folder}/web.elf"',
            f'dump-guest-memory -z "{folder}/web.kdump"',
            f'pmemsave 0 {int(MEMORY[:-1]) << 20} "{folder}/web.ram"',
            f'migrate "exec:cat > {folder}/web.mig"',
            "quit",
        ]
        qemu.communicate("".join(f"{each}\n" for each in said), timeout=600)
    shutil.rmtree(guest)


@contextmanager
def _machine(initrd: Path, serial: Path) -> Iterator[subprocess.Popen[str]]:
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", MEMORY, "-nodefaults", "-display", "none"]
    command += ["-kernel", str(kernels()[-1]), "-initrd", str(initrd), "-append", f"{ARGUMENTS} nokaslr"]
    command += ["-serial", f"file:{serial}", "-monitor", "stdio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        try:
            yield qemu
        finally:
            qemu.kill()


def crash(image: Path, vmlinux: str) -> str:
    """Returns what crash says of an image, without the image's name."""
    command = ["crash", "-s", vmlinux, str(image)]
    done = subprocess.run(command, input=COMMANDS, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        return f"exit {done.returncode}: {done.stdout}{done.stderr}"
    return re.sub(r"^ *DUMPFILE: .*$", "", done.stdout, flags=re.MULTILINE)


def pslist(image: Path, symbols: str) -> list[tuple[int, str]]:
    """Returns the processes that volatility3 finds in an image."""
    beside = image.with_suffix(".vmem")
    path = beside if image.suffix == ".vmss" else image
    command = [str(Path(sys.executable).with_name("vol")), "-q", "-r", "json", "-f", str(path)]
    command += ["-s", str(Path(symbols).resolve().parent), "linux.pslist"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    return [(each["PID"], each["COMM"]) for each in json.loads(done.stdout)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("vmlinux")
    parser.add_argument("--symbols", metavar="ISF")
    parser.add_argument("--sources", default=",".join(SOURCES), help="of what QEMU wrote (default: %(default)s)")
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help="of what vmconv makes of it (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
