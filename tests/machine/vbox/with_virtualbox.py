"""Registers our machines with a real VirtualBox, which checks the ids of their disks. Run by hand.

    python tests/machine/vbox/with_virtualbox.py DIRECTORY [--seen-as PATH] [--manage PROGRAM]

PROGRAM is VBoxManage, or a script that runs it elsewhere, such as in a chroot where PATH is DIRECTORY. No kernel module
is needed. Result with VirtualBox 7.2.22: all disks of vdi, vhd and raw are "created", and VirtualBox shows the name,
memory, processors, firmware, UUID and MAC address of the source.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import vmconv

UUID = "564d1234-0000-1111-2222-333344445555"
CONF = f"""\
name: web
ostype: l26
bios: ovmf
memory: 2048
cores: 4
scsihw: virtio-scsi-single
scsi0: local:100/one.raw,size=16M
sata0: local:100/two.raw,size=16M,serial=AB
virtio0: local:100/three.raw,size=16M
net0: e1000=52:54:00:01:02:03,bridge=vmbr0
smbios1: uuid={UUID}
"""
EXPECTED = {
    "name": "web",
    "memory": "2048",
    "cpus": "4",
    "firmware": "EFI",
    "hardwareuuid": UUID,
    "macaddress1": "525400010203",
    "nictype1": "82540EM",
    "SATA-0-0": "two",
    "SATA-1-0": "three",
    "VirtIO-0-0": "one",
}


def manage(command: list[str], *words: str) -> str:
    done = subprocess.run([*command, "-q", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def check(directory: Path, seen: str, form: str, command: list[str]) -> None:
    """Exits with the difference unless VirtualBox takes the machine, and finds each of its disks."""
    source = directory / "source"
    result = vmconv.machine_convert(source / "100.conf", directory / form, target_format="vbox", disk_format=form)
    machine = vmconv.machine_info(result.target)
    own = str(machine.identity.instance_uuid)
    numbers = {disk.target: Path(disk.source).stem for disk in result.plan.disks}
    manage(command, "registervm", f"{seen}/{form}/{Path(result.target).name}")
    try:
        shown = manage(command, "showvminfo", own, "--machinereadable").splitlines()
        found: dict[str, Any] = {}
        for key, _, value in (line.partition("=") for line in shown):
            text = value.strip('"')
            found[key.strip('"')] = numbers.get(Path(text).name, text)
        different = {key: found.get(key) for key, value in EXPECTED.items() if found.get(key) != value}
        media = [key for key in found if "ImageUUID" in key]
        states = [manage(command, "showmediuminfo", "disk", found[key]) for key in media]
    finally:
        manage(command, "unregistervm", own)
    if different or len(states) != 3 or not all("State:          created" in state for state in states):
        sys.exit(f"{form}: {json.dumps(different)}\n{''.join(states)}")
    print(f"{form}: VirtualBox takes the machine and its {len(states)} disks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seen-as")
    parser.add_argument("--manage", default="VBoxManage")
    given = parser.parse_args()
    source = given.directory / "source"
    source.mkdir(parents=True)
    (source / "100.conf").write_text(CONF)
    for name in ("one", "two", "three"):
        (source / f"{name}.raw").write_bytes(name.encode() * 512 + bytes((16 << 20) - 512 * len(name)))
    for form in ("vdi", "vmdk", "vhd", "raw"):
        check(given.directory, given.seen_as or str(given.directory), form, [given.manage])


if __name__ == "__main__":
    main()
