"""Names of disks and of their files in domain XML."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree.ElementTree import fromstring, parse

import pytest

import vmconv
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


@pytest.mark.parametrize("directory", ["/srv/web", "/srv/./web/", "/srv/old/../web"])
def test_a_domain_names_its_disks_in_the_directory_that_they_move_to(directory: str, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "old.xml").write_text(
        f"""<domain type="kvm"><name>web</name><memory>1048576</memory><os><type arch="x86_64">hvm</type></os><devices>
        <disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="{tmp_path}/disk.raw"/>
        <target dev="vda" bus="virtio"/></disk></devices></domain>"""
    )
    options = {"directory": directory}
    vmconv.machine_convert(tmp_path / "old.xml", tmp_path / "new", target_format="libvirt", options=options)
    (source,) = parse(tmp_path / "new/web.xml").findall("devices/disk/source")
    assert os.path.normpath(source.attrib["file"]) == "/srv/web/web-disk1.qcow2"
