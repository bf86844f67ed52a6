r"""Gives our machines to a real VirtualBox: settings files with their disks, OVAs, and EFI variables. Run by hand.

    python tests/machine/vbox/with_virtualbox.py DIRECTORY [--seen-as PATH] [--manage PROGRAM] [--nvram FILE]

PROGRAM is VBoxManage, or a script that runs it elsewhere, such as in a chroot where PATH is DIRECTORY. No kernel module
is needed. FILE is a `.nvram` of VMware with keys of Secure Boot, for a machine that starts by UEFI. qemu-img compares
the content of imported disks with the source. `docs/guide/machines-vbox.md` has the results. A chroot of Debian sid:

    debootstrap --variant=minbase --include=ca-certificates sid sid MIRROR
    echo "deb MIRROR sid main contrib" > sid/etc/apt/sources.list
    chroot sid apt-get update && chroot sid apt-get install -y --no-install-recommends virtualbox
    mount -t proc proc sid/proc; mkdir sid/work; mount --bind DIRECTORY sid/work
    printf '#!/bin/sh\nexec chroot sid VBoxManage "$@"\n' > manage; chmod 755 manage
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import vmconv
from vmconv.machine import nvram

MIB = 1 << 20
UUID = "564d1234-0000-1111-2222-333344445555"
NAMES = ("one", "two", "three")
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
VMX = f"""\
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
displayName = "store"
guestOS = "debian12-64"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
nvram = "store.nvram"
memsize = "1024"
uuid.bios = "{UUID.replace("-", "")}"
sata0.present = "TRUE"
sata0:0.present = "TRUE"
sata0:0.fileName = "one.vmdk"
sata0:1.present = "TRUE"
sata0:1.fileName = "two.vmdk"
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
KEYS = ("PK", "KEK", "db", "dbx")
ATTEMPTS = 10


class Box(NamedTuple):
    """VirtualBox, and the directory in which both sides see the files: `here` and `there`."""

    program: str
    here: Path
    there: str

    def started(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.program, "-q", *words], capture_output=True, text=True, check=False)

    def manage(self, *words: str) -> str:
        """Returns the output of VBoxManage; exits if it fails."""
        done = self.started(*words)
        if done.returncode:
            sys.exit(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def seen(self, path: Path) -> str:
        return f"{self.there}/{path.relative_to(self.here)}"

    def shown(self, machine: str) -> dict[str, str]:
        """Returns what VirtualBox shows of a machine."""
        lines = self.manage("showvminfo", machine, "--machinereadable").splitlines()
        pairs = (line.partition("=") for line in lines)
        return {key.strip('"'): value.strip('"') for key, _, value in pairs}

    def path(self, shown: str) -> Path:
        """Returns the path of a file that VirtualBox shows."""
        return self.here / Path(shown).relative_to(self.there)


def settings_file(box: Box, config: Path, form: str) -> None:
    """Exits with the difference unless VirtualBox takes the machine, and finds each of its disks."""
    result = vmconv.machine_convert(config, box.here / form, target_format="vbox", disk_format=form)
    numbers = {disk.target: Path(disk.source).stem for disk in result.plan.disks}
    own = str(vmconv.machine_info(result.target).identity.instance_uuid)
    box.manage("registervm", box.seen(Path(result.target)))
    try:
        found = box.shown(own)
        media = {key: found[key] for key in found if "ImageUUID" in key}
        states = [box.manage("showmediuminfo", "disk", each) for each in media.values()]
    finally:
        box.manage("unregistervm", own)
    named = {key: numbers.get(Path(text).name, text) for key, text in found.items()}
    different = {key: named.get(key) for key, value in EXPECTED.items() if named.get(key) != value}
    if different or len(states) != 3 or not all("State:          created" in state for state in states):
        sys.exit(f"{form}: {json.dumps(different)}\n{''.join(states)}")
    print(f"{form}: VirtualBox takes the machine and its {len(states)} disks")


def layered(box: Box, config: Path, form: str) -> None:
    """Exits unless VirtualBox finds both layers of the first disk, and reads the content of both together."""
    result = vmconv.machine_convert(
        config, box.here / f"layers-{form}", target_format="vbox", disk_format=form, chain=True
    )
    own = str(vmconv.machine_info(result.target).identity.instance_uuid)
    box.manage("registervm", box.seen(Path(result.target)))
    try:
        top = box.shown(own)["SATA-ImageUUID-0-0"]
        said = box.manage("showmediuminfo", "disk", top)
        copy = box.here / f"layers-{form}.raw"
        box.manage("clonemedium", "disk", top, box.seen(copy), "--format", "RAW")
        box.manage("closemedium", "disk", box.seen(copy))
    finally:
        box.manage("unregistervm", own)
    source = config.parent / result.plan.disks[0].source
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(copy), str(source)]
    same = not subprocess.run(compare, capture_output=True, check=False).returncode
    if not same or "State:          created" not in said or "Parent UUID:    base" in said:
        sys.exit(f"layers of {form}: {said}")
    print(f"{form}: VirtualBox reads a disk of two layers as in the source")


def package(box: Box, config: Path, title: str, disks: int, *, of: Path | None = None, **options: str) -> None:
    """Exits unless VirtualBox imports the OVA of a machine, with the content of its disks, or of those in `of`."""
    target = box.here / f"{title}.ova"
    result = vmconv.machine_convert(config, target, options=options)
    box.manage("import", "--dry-run", box.seen(target))
    crashes = imported_by(box, target, title)
    try:
        found = box.shown(title)
        imported = [box.path(text) for key, text in found.items() if text.endswith(".vmdk") and "ImageUUID" not in key]
        sources = [config.parent / disk.source.rpartition("/")[2] for disk in result.plan.disks]
        sources = [of / f"{name}.raw" for name in NAMES] if of else sources
        if sorted(source_of(disk, sources) for disk in imported) != list(range(disks)):
            sys.exit(f"{title}: {imported} are not {sources}")
        if "nvram" in title:
            variables(box, title, config.parent / "store.nvram")
    finally:
        box.manage("unregistervm", title, "--delete")
    totals = result.plan.totals
    shared = f"shared {totals.shared}, copied {totals.copied}"
    print(f"{title}: imported, {disks} disks have the same content ({shared}, {crashes} crashes of VBoxSVC)")


def imported_by(box: Box, package: Path, name: str) -> int:
    """Imports a package, and returns how often VBoxSVC crashed before.

    VBoxSVC 7.2.22 crashes in about one import of four, in a race: not under a debugger. It does so with packages of
    disks that qemu-img or VirtualBox itself wrote, too.
    """
    for crashes in range(ATTEMPTS):
        folder = box.here / f"{package.stem}-imported-{crashes}"
        words = ("import", box.seen(package), "--vsys", "0", "--vmname", name, "--basefolder", box.seen(folder))
        done = box.started(*words)
        if done.returncode == 0:
            return crashes
        if "NS_ERROR_ABORT" not in done.stderr + done.stdout:
            break
        time.sleep(2)
        left = box.started("unregistervm", name)
        print(f"{name}: VBoxSVC crashed{'' if left.returncode else ', and had registered the machine'}")
    sys.exit(f"{package}: {done.stdout}{done.stderr}")


def source_of(disk: Path, sources: list[Path]) -> int:
    """Returns the number of the source with the content of an imported disk; -1 if there is none."""
    for number, source in enumerate(sources):
        command = ["qemu-img", "compare", "-f", "vmdk", "-F", source.suffix[1:], str(disk), str(source)]
        if not subprocess.run(command, capture_output=True, check=False).returncode:
            return number
    return -1


def variables(box: Box, machine: str, source: Path) -> None:
    """Exits unless VirtualBox reads the keys of a store of VMware's in the one that we wrote, and changes it."""
    count = len(box.manage("modifynvram", machine, "listvars").splitlines())
    known = {each.name: each.data for each in nvram.read(source.read_bytes(), source.name).variables}
    file = box.here / "variable"
    for name in KEYS:
        box.manage("modifynvram", machine, "queryvar", f"--name={name}", f"--filename={box.seen(file)}")
        if file.read_bytes() != known[name]:
            sys.exit(f"{machine}: {name} is another one")
    for word in ("--disable", "--enable"):
        box.manage("modifynvram", machine, "secureboot", word)
    print(f"{machine}: VirtualBox lists {count} variables, reads {', '.join(KEYS)}, and sets Secure Boot")


def stored_settings(box: Box, config: Path) -> None:
    """Does the same with the variables beside a settings file."""
    result = vmconv.machine_convert(config, box.here / "stored", target_format="vbox")
    own = str(vmconv.machine_info(result.target).identity.instance_uuid)
    box.manage("registervm", box.seen(Path(result.target)))
    try:
        variables(box, own, config.parent / "store.nvram")
    finally:
        box.manage("unregistervm", own)


def make_sources(directory: Path, store: Path | None) -> tuple[Path, Path]:
    """Returns the configurations of a machine of Proxmox and one of VMware, with their disks."""
    directory.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        content = random.Random(number)
        with (directory / f"{name}.raw").open("wb") as disk:
            for at in range(number, 16, 2 + number):
                disk.seek(at * MIB)
                disk.write(content.randbytes(MIB // 2))
            disk.truncate(16 * MIB)
        if number < 2:
            vmconv.convert(directory / f"{name}.raw", directory / f"{name}.vmdk")
    (directory / "100.conf").write_text(CONF)
    lines = VMX.splitlines() if store else [line for line in VMX.splitlines() if "nvram" not in line]
    (directory / "store.vmx").write_text("\n".join(lines) + "\n")
    if store:
        (directory / "store.nvram").write_bytes(store.read_bytes())
    return directory / "100.conf", directory / "store.vmx"


def make_layers(directory: Path) -> Path:
    """Returns the configuration of a machine of Proxmox whose disk has two layers."""
    directory.mkdir(exist_ok=True)
    (directory / "101.conf").write_text("name: layers\nmemory: 512\nsata0: local:101/top.qcow2,size=16M\n")
    if not (directory / "top.qcow2").exists():
        vmconv.convert(directory.parent / "source/one.raw", directory / "base.qcow2")
        create = "qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 top.qcow2"
        write = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 77 1M 100k", "-c", "write -q -z 4M 1M", "top.qcow2"]
        for command in (create.split(), write):
            subprocess.run(command, cwd=directory, check=True)
    return directory / "101.conf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seen-as")
    parser.add_argument("--manage", default="VBoxManage")
    parser.add_argument("--nvram", type=Path)
    given = parser.parse_args()
    box = Box(given.manage, given.directory, given.seen_as or str(given.directory))
    proxmox, vmware = make_sources(given.directory / "source", given.nvram)
    print(box.manage("--version").strip())
    for form in ("vdi", "vmdk", "vhd", "raw"):
        settings_file(box, proxmox, form)
    for form in ("vdi", "vmdk", "vhd"):
        layered(box, make_layers(given.directory / "layers"), form)
    for manifest in ("none", "sha256"):
        package(box, proxmox, f"three-{manifest}", 3, manifest=manifest)
        package(box, vmware, f"{'nvram' if given.nvram else 'two'}-{manifest}", 2, manifest=manifest)
    package(box, proxmox, "three-compressed", 3, disk_format="streamOptimized", manifest="sha256")
    again = box.here / "three-compressed.ova"
    package(box, again, "three-kept", 3, disk_format="streamOptimized", manifest="sha256", of=proxmox.parent)
    if given.nvram:
        stored_settings(box, vmware)


if __name__ == "__main__":
    main()
