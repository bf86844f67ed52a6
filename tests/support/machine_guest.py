"""A Linux guest that says on its serial port which machine it is in. It boots from a BIOS and from UEFI."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from support.guest import ARGUMENTS, make_guest, run, what_is_missing

STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")

MODULES = ("vmw_pvscsi", "vmxnet3", "virtio_pci", "virtio_scsi", "virtio_blk", "virtio_net", "sd_mod")
"""Drivers of storage and of network cards; Debian's kernel for clouds has none for LSI, AHCI and E1000."""

INIT = f"""#!/bin/busybox sh
for applet in mount umount sha256sum cat echo ls sleep modprobe basename readlink poweroff; do
    /bin/busybox ln -s busybox /bin/$applet
done
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
modprobe -a {" ".join(MODULES)}
for second in 1 2 3 4 5 6 7 8 9 10; do
    disk=$(ls /dev/sda2 /dev/vda2 2>/dev/null) && break
    sleep 1
done
mount -t ext4 -o ro $disk /mnt
dmi=/sys/class/dmi/id
[ -d /sys/firmware/efi ] && firmware=uefi || firmware=bios
echo "guest firmware: $firmware"
echo "guest uuid: $(cat $dmi/product_uuid)"
echo "guest serial: $(cat $dmi/product_serial)"
echo "guest controller: $(cat /sys/class/scsi_host/host*/proc_name)"
echo "guest macs: $(cat /sys/class/net/eth*/address)"
echo "guest card: $(basename $(readlink /sys/class/net/eth0/device/driver))"
echo "guest payload: $(sha256sum < /mnt/payload)"
umount /mnt
poweroff -f
"""


def what_lacks() -> str | None:
    """Returns what the guest cannot be made without, or None when all is there."""
    if not STUB.exists():
        return f"{STUB} is not there (systemd-boot-efi)"
    return what_is_missing() if shutil.which("objcopy") else "objcopy is not installed"


def make_machine_guest(directory: Path) -> tuple[Path, str]:
    """Returns a raw disk that boots, made in an empty directory, and the sha256 of the payload in it."""
    return make_guest(directory, INIT, MODULES, _add_uefi_image)


def _add_uefi_image(files: Path) -> None:
    """Adds the file that UEFI starts without boot entries: kernel, arguments and initramfs behind systemd's stub.

    UAPI Group Specifications, "Unified Kernel Image". The addresses are those of systemd's documentation.
    """
    (files.parent / "arguments").write_text(ARGUMENTS)
    sections: Mapping[str, tuple[Path, int]] = {
        ".cmdline": (files.parent / "arguments", 0x30000),
        ".linux": (files / "vmlinuz", 0x2000000),
        ".initrd": (files / "initrd", 0x3000000),
    }
    words: list[str | Path] = []
    for name, (content, address) in sections.items():
        words += ["--add-section", f"{name}={content}", "--change-section-vma", f"{name}={address:#x}"]
    (files / "EFI/BOOT").mkdir(parents=True)
    run("objcopy", *words, STUB, files / "EFI/BOOT/BOOTX64.EFI")


def said_by_guest(console: str) -> dict[str, str]:
    """Returns what the guest said on its serial port, by name."""
    return dict(re.findall(r"^guest (\w+): (.*?)\r*$", console, re.MULTILINE))
