"""The command that makes a converted guest ready for KVM: drivers, boot loader, fstab. vmconv changes no filesystem."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from vmconv.io.registry import installed
from vmconv.machine.findings import first_disk
from vmconv.machine.layout import disk_format, suffix_of
from vmconv.machine.target import target_of

if TYPE_CHECKING:
    from vmconv.machine.model import Machine
    from vmconv.machine.request import MachineRequest

_KVM = ("libvirt", "proxmox", "kubevirt")


def handoff(request: MachineRequest, machine: Machine) -> list[str]:
    """Returns lines on what to run after the conversion of `request`, the command last and indented."""
    if request.target_format is None:
        return ["After a conversion for KVM, virt-v2v-in-place repairs drivers and fstab, never on the source."]
    if request.target_format not in _KVM:
        return ["virt-v2v repairs guests for KVM only: install drivers and change fstab in the guest before."]
    target = target_of(request, machine)
    if request.target_format == "libvirt":
        words = ["-i", "libvirtxml", f"DIRECTORY/{target.name}"]
    else:
        wanted = disk_format(target, request, installed())
        below = "" if target.directory == "." else f"{target.directory}/"
        boot = first_disk(target.adapted.machine) or 0
        path = f"DIRECTORY/{below}{target.disk_name(boot, suffix_of(wanted))}"
        words = ["-i", "disk", "-if", wanted.name, path]
    about = "After the conversion, virt-v2v repairs drivers and fstab, on the new machine's disks, never on the source:"
    return [about, f"  {shlex.join(['virt-v2v-in-place', *words])}"]
