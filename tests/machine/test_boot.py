"""A guest boots in a converted machine, and finds there what its old machine promised.

libvirt makes QEMU's command line from the converted domain: firmware, controller, network card, MAC address, UUID and
serial number. The test connects its own ends to the network card and to the serial port: the old host's are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, parse

import pytest

import vmconv
from support.libvirt_host import LibvirtHost, short_directory
from support.machine_guest import make_machine_guest, said_by_guest, what_lacks
from support.requirements import missing
from vmconv.cli.main import main

pytestmark = pytest.mark.slow

BOOT_TIMEOUT = 300
"""Seconds until a guest that says nothing counts as hanging. It takes about 20 where nothing else runs."""

WEB = """.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
displayName = "web"
guestOS = "debian12-64"
firmware = "{firmware}"
memsize = "256"
uuid.bios = "42 1f 24 5c 7f a8 60 fa-0f 33 4d 2e 9b 1a c0 de"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.deviceType = "scsi-hardDisk"
scsi0:0.fileName = "web.vmdk"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.connectionType = "nat"
ethernet0.addressType = "static"
ethernet0.address = "00:50:56:12:34:56"
"""

PROMISED = {
    # VMware puts the bytes into SMBIOS as they stand. SMBIOS stores the first three fields with the low byte first.
    "uuid": "5c241f42-a87f-fa60-0f33-4d2e9b1ac0de",
    "serial": "VMware-42 1f 24 5c 7f a8 60 fa-0f 33 4d 2e 9b 1a c0 de",
    "macs": "00:50:56:12:34:56",
    "card": "vmxnet3",
}


@pytest.fixture(scope="module")
def host() -> Iterator[LibvirtHost]:
    with short_directory() as directory:
        yield LibvirtHost(directory)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A raw disk that boots, and the sum of its payload."""
    lack = what_lacks()
    if lack:
        missing("oracle", lack)
    return make_machine_guest(tmp_path_factory.mktemp("guest"))


@pytest.mark.parametrize(
    ("firmware", "way", "controller"),
    [
        ("bios", ("libvirt",), "vmw_pvscsi"),
        ("bios", ("ova", "libvirt"), "vmw_pvscsi"),
        # Debian's OVMF has no driver for pvscsi.
        ("efi", ("libvirt",), "virtio_scsi"),
        ("efi", ("ova", "vmx", "libvirt"), "virtio_scsi"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_a_guest_boots_in_the_machine_that_the_source_promised(
    xfs_dir: Path,
    host: LibvirtHost,
    guest: tuple[Path, str],
    firmware: str,
    way: tuple[str, ...],
    controller: str,
) -> None:
    config = xfs_dir / "source" / "web.vmx"
    config.parent.mkdir()
    config.write_text(WEB.format(firmware=firmware))
    vmconv.convert(guest[0], config.with_suffix(".vmdk"))
    for name in way:
        options = ["-o", "type=qemu"] if name == "libvirt" else []
        assert main(["machine", "convert", "-q", "-O", name, *options, str(config), str(xfs_dir / name)]) == 0
        (config,) = (path for path in (xfs_dir / name).iterdir() if path.suffix in (".xml", ".ova", ".vmx"))
    assert boot(host, config) == {
        **PROMISED,
        "firmware": {"bios": "bios", "efi": "uefi"}[firmware],
        "controller": controller,
        "payload": f"{guest[1]}  -",
    }


def boot(host: LibvirtHost, config: Path) -> dict[str, str]:
    """Returns what the guest of a domain says until it powers off."""
    domain, console = parse(config), config.with_suffix(".console")
    connect(domain, console)
    domain.write(config.with_suffix(".run"))
    wait = f"qemu-monitor-event --domain web --event SHUTDOWN --timeout {BOOT_TIMEOUT}"
    try:
        said = host.run(f"create --validate {config.with_suffix('.run')}", wait, timeout=2 * BOOT_TIMEOUT)
    finally:
        # libvirt may have removed the domain of a guest that has powered off, so destroying it may fail.
        assert "web" not in host.run("destroy web", "list --name")
    found = said_by_guest(console.read_text(errors="replace"))
    assert "SHUTDOWN" in said and found, f"{said}\n{console.read_text(errors='replace')[-5000:]}"
    return found


def connect(domain: ElementTree[Element], console: Path) -> None:
    """Connects the network card to no network of the host, the serial port to a file, and nothing to the screen.

    Two hosts of tests that run at the same time would choose the same port for VNC.
    """
    (card,) = domain.iter("interface")
    card.set("type", "user")
    for source in card.findall("source"):
        card.remove(source)
    (devices,) = domain.iter("devices")
    for screen in devices.findall("graphics"):
        devices.remove(screen)
    SubElement(SubElement(devices, "serial", type="file"), "source", path=str(console))
