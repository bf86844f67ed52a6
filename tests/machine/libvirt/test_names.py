"""Names of disks in domain XML."""

from __future__ import annotations

from xml.etree.ElementTree import fromstring

from vmconv.machine import Disk, GuestOS, Machine, Memory, Removable
from vmconv_libvirt import Libvirt


def test_names_of_disks_begin_with_the_prefix_of_their_bus() -> None:
    one = Libvirt()
    disks = tuple(
        Disk(file=f"{at}.img", format="raw", bus=bus, controller=0, unit=at)
        for at, bus in enumerate(("scsi", "sata", "virtio", "ide", "scsi"))
    )
    floppy = Removable(kind="floppy", bus="floppy", controller=0, unit=0)
    linux = GuestOS(id="debian12")
    base = Machine(name="x", os=linux, memory=Memory(size=1 << 30), disks=disks, removables=(floppy,))
    adapted = one.adapt(base, one.options()()).machine
    root = fromstring(one.write(adapted, one.options()())[-1].content)
    found = {(target.get("bus"), str(target.get("dev"))[:2]) for target in root.iter("target") if target.get("bus")}
    assert found == {("scsi", "sd"), ("sata", "sd"), ("virtio", "vd"), ("ide", "hd"), ("fdc", "fd")}
