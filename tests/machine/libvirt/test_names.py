"""Names of disks in domain XML."""

from __future__ import annotations

from xml.etree.ElementTree import fromstring

from vmconv.machine import Controller, Disk, Machine, Memory, Removable
from vmconv_libvirt import Libvirt


def test_names_of_disks_begin_with_the_prefix_of_their_bus() -> None:
    one = Libvirt()
    disks = tuple(
        Disk(file=f"{at}.img", format="raw", bus=bus, controller=0, unit=at)
        for at, bus in enumerate(("scsi", "sata", "virtio", "ide", "scsi"))
    )
    floppy = Removable(kind="floppy", bus="floppy", controller=0, unit=0)
    scsi = Controller(bus="scsi", index=0, model="virtio-scsi")
    base = Machine(name="x", memory=Memory(size=1 << 30), controllers=(scsi,), disks=disks, removables=(floppy,))
    adapted = one.adapt(base, one.options()()).machine
    root = fromstring(one.write(adapted, one.options()())[-1].content)
    found = {(target.get("bus"), str(target.get("dev"))[:2]) for target in root.iter("target") if target.get("bus")}
    assert found == {("scsi", "sd"), ("sata", "sd"), ("virtio", "vd"), ("ide", "hd"), ("fdc", "fd")}
