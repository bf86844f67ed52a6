"""A virtual machine as libvirt's domain XML, with a disk."""

from __future__ import annotations

from pathlib import Path

from .disks import MIB, make_disk

SHOP = """<domain type='kvm'><name>shop</name><memory unit='MiB'>512</memory><vcpu>2</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk>
<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/>
<model type='virtio'/></interface>
<watchdog model='i6300esb' action='reset'/>
</devices></domain>"""
"""Has a watchdog, for which VMware has no place."""


def shop(directory: Path, disk: str = "shop.raw") -> Path:
    """Makes the machine with a disk of 4 MiB, and returns its configuration."""
    make_disk(directory / disk, 4 * MIB)
    config = directory / "shop.xml"
    config.write_text(SHOP.format(disk=disk), encoding="ascii")
    return config
