"""libvirt's domain XML: the conformance kit, what is read, what changes, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.corpus import configurations
from support.machine_documents import LIBVIRT as DOMAIN
from vmconv.errors import ImageError, PlanError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.machine import (
    Controller,
    Cpu,
    Disk,
    Display,
    Firmware,
    GuestOS,
    Machine,
    Memory,
    Nic,
    Nvram,
    Removable,
    Serial,
    Tpm,
    parse_xml,
)
from vmconv.plugin import Adapted
from vmconv.testing import MachineTests
from vmconv.testing.disks import image_file
from vmconv_libvirt import Libvirt
from vmconv_libvirt.options import Options

LIBVIRT = Libvirt()


class TestLibvirt(MachineTests):
    format = LIBVIRT


class TestLibvirtVirtio(MachineTests):
    format = LIBVIRT
    options: ClassVar = {"bus": "virtio", "network": "lan"}


def read(text: str | bytes) -> Machine:
    content = text.encode() if isinstance(text, str) else text
    with Opener(installed()) as opener:
        return LIBVIRT.read(image_file(content, "web.xml"), opener)


def smallest(inside: str = "", devices: str = "", kind: str = "kvm") -> str:
    """Returns a domain with these elements."""
    system = "" if "<os" in inside else "<os><type>hvm</type></os>"
    return f"<domain type='{kind}'><name>x</name>{system}{inside}<devices>{devices}</devices></domain>"


def adapted(machine: Machine, **options: Any) -> Adapted:
    return LIBVIRT.adapt(machine, Options(**options))


def machine(**values: Any) -> Machine:
    return Machine(**{"name": "x", "memory": Memory(size=1 << 30), **values})


def written(subject: Machine, **options: Any) -> str:
    return LIBVIRT.write(adapted(subject, **options).machine, Options(**options))[-1].content.decode()


def reasons(result: Adapted) -> dict[str, tuple[str, str]]:
    return {each.path: (each.before, each.after) for each in result.substitutions}


def test_it_claims_domains_after_any_prolog() -> None:
    for start in ("", "\ufeff", "<?xml version='1.0'?>\n<!-- a - b -->\n", " \n"):
        assert LIBVIRT.probe(image_file(f"{start}<domain type='kvm'>".encode(), "x"))
    for start in ("<domains>", "<!-- <domain> -->", "<domainsnapshot/>", "x<domain>"):
        assert not LIBVIRT.probe(image_file(start.encode(), "x"))


def test_settings_of_a_domain_are_read() -> None:
    found = read(DOMAIN)
    assert found.os == GuestOS(id="win2k22", architecture="x86_64")
    assert found.cpu == Cpu(count=2, cores=2, threads=2, model="Skylake-Server")
    assert found.memory == Memory(size=2 << 30)
    nvram = Nvram(file="/var/lib/libvirt/qemu/nvram/web_VARS.fd", kind="ovmf")
    assert found.firmware == Firmware(kind="uefi", secure_boot=True, nvram=nvram)
    assert found.identity.uuid == UUID("421f245c-7fa8-60fa-8b8d-c3a4bd2b2f0d")
    assert (found.identity.serial, found.identity.asset_tag) == ("VMware-42 1f", "A1")
    assert (found.board.chipset, found.board.hardware_version) == ("q35", "pc-q35-7.2")
    assert found.board.clock == "localtime"


def test_devices_of_a_domain_are_read() -> None:
    found = read(DOMAIN)
    place = {"bus": "scsi", "controller": 0, "unit": 3, "boot_index": 1}
    first = Disk(file="/images/web.qcow2", format="qcow2", mode="persistent", shared=False, discard=True, serial="S1")
    assert found.disks[0] == first.model_copy(update=place)
    nonpersistent = "independent-nonpersistent"
    block = Disk(device="/dev/sdx", mode=nonpersistent, shared=True, bus="virtio", controller=0, unit=0)
    assert found.disks[1] == block
    assert (found.disks[2].device, found.disks[2].file) == ("rbd:pool/image", None)
    assert (found.disks[2].controller, found.disks[2].unit) == (1, 0)
    assert found.removables == (Removable(kind="cdrom", bus="sata", controller=0, unit=1, connected=False),)
    assert found.controllers == (
        Controller(bus="ide", index=1, model="piix3"),
        Controller(bus="sata", index=0, model="ahci"),
        Controller(bus="scsi", index=0, model="pvscsi", pci_slot="0000:03:00.1"),
    )
    bridge: Any = {"network": "br0", "network_kind": "bridged"}
    assert found.nics == (
        Nic(mac="52:54:00:aa:bb:cc", model="vmxnet3", connected=False, boot_index=0, **bridge),
        Nic(network="lan"),
        Nic(network_kind="nat"),
        Nic(network="eth0", network_kind="bridged"),
    )
    assert found.serials == (Serial(index=1, kind="network", target="telnet://127.0.0.1:4555?server"),)
    assert found.passthrough == ("pci bus=0x1 domain=0x0 function=0 slot=0",)
    assert found.display == Display(model="vmware", memory=16 << 20, heads=1)
    assert (found.sound, found.watchdog, found.usb, found.rng) == ("hda", "i6300esb", "xhci", True)
    assert found.tpm == Tpm(version="2.0")


def test_what_a_domain_says_of_devices_beyond_the_model_is_named() -> None:
    found = read(
        DOMAIN.replace("<source file='/images/web.qcow2'/>", "<source file='a'><encryption format='luks'/></source>")
        .replace(
            "<interface type='user'/>",
            "<interface type='user' managed='no'><mac address='52:54:00:aa:bb:cd' x='y'/></interface>",
        )
        .replace("<sound model='ich6'/>", "<sound model='ich6'/><sound model='ac97'/>")
        .replace(
            "<nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>",
            "<nvram type='network'><source protocol='iscsi'/></nvram>",
        )
    ).extra["libvirt"]
    assert found["devices/disk[1]/source/encryption"] == '<encryption format="luks" />'
    assert (found["devices/interface[3]@managed"], found["devices/interface[3]/mac@x"]) == ("no", "y")
    assert found["devices.sound"] == '<sound model="ac97" />'
    assert found["os.nvram"] == '<nvram type="network"><source protocol="iscsi" /></nvram>'


def test_settings_without_a_neutral_meaning_are_written_again() -> None:
    found = read(DOMAIN.replace("vmpvscsi", "virtio-scsi"))
    kept = found.extra["libvirt"]
    assert kept["cputune"] == "<cputune><shares>512</shares></cputune>"
    result = adapted(found)
    again = read(LIBVIRT.write(result.machine, Options())[-1].content)
    dropped = {key for key in kept if key not in again.extra["libvirt"]}
    assert dropped == {"devices.filesystem", "devices/disk[3]/source/host"}
    assert again.extra["libvirt"] == result.machine.extra["libvirt"]
    assert again.cpu.count == 2 and kept["vcpu"] == "<vcpu>8</vcpu>"


def test_what_reaches_the_source_host_is_not_taken_over() -> None:
    devices = "<channel type='unix'><source mode='bind' path='/run/x'/></channel><filesystem/>"
    command = "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-x'/></q:commandline>"
    subject = read(smallest(f"<memory>1024</memory><numatune/>{command}", devices))
    assert set(subject.extra["libvirt"]) >= {"devices.channel", "devices.filesystem", "commandline", "numatune"}
    text = written(subject)
    assert "commandline" not in text and "/run/x" not in text and "filesystem" not in text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("<memory>1024</memory>", 1 << 20),
        ("<memory unit='b'>4096</memory>", 4096),
        ("<memory unit='bytes'>4096</memory>", 4096),
        ("<memory unit='KB'>5</memory>", 5000),
        ("<memory unit='k'>5</memory>", 5120),
        ("<memory unit='MB'>5</memory>", 5_000_000),
        ("<memory unit='M'>5</memory>", 5 << 20),
        ("<memory unit='MiB'>5</memory>", 5 << 20),
        ("<memory unit='GB'>1</memory>", 10**9),
        ("<memory unit='G'>1</memory>", 1 << 30),
        ("<memory unit='TiB'>1</memory>", 1 << 40),
    ],
)
def test_memory_has_the_units_of_libvirt(text: str, size: int) -> None:
    assert read(smallest(text)).memory.size == size


@pytest.mark.parametrize(
    ("system", "kind", "secure"),
    [
        ("<os><type>hvm</type></os>", "bios", None),
        ("<os><type arch='aarch64'>hvm</type></os>", None, None),
        ("<os firmware='efi'><type>hvm</type></os>", "uefi", None),
        ("<os firmware='bios'><type>hvm</type></os>", "bios", None),
        ("<os><type>hvm</type><loader>/usr/share/ovmf/OVMF.fd</loader></os>", None, None),
        ("<os><type>hvm</type><loader type='pflash'>/x.fd</loader></os>", "uefi", None),
        ("<os><type>hvm</type><loader type='pflash' secure='yes'>/x.fd</loader></os>", "uefi", True),
        ("<os><type>hvm</type><loader type='pflash' secure='no'>/x.fd</loader></os>", "uefi", False),
    ],
)
def test_firmware_is_read_from_the_loader_or_the_choice(system: str, kind: str | None, secure: bool | None) -> None:
    firmware = read(smallest(system)).firmware
    assert (firmware.kind, firmware.secure_boot) == (kind, secure)


def test_a_firmware_without_enrolled_keys_does_not_enforce_secure_boot() -> None:
    features = "<feature name='secure-boot' enabled='yes'/><feature name='enrolled-keys' enabled='no'/>"
    system = f"<os firmware='efi'><type>hvm</type><firmware>{features}</firmware></os>"
    assert read(smallest(system)).firmware.secure_boot is False


@pytest.mark.parametrize(
    ("bus", "name", "place"),
    [
        ("ide", "hdd", (1, 1)),
        ("sata", "sdg", (1, 0)),
        ("scsi", "sdh", (0, 8)),
        ("scsi", "sdp", (1, 0)),
        ("virtio", "vdab", (0, 27)),
        ("fdc", "fdb", (0, 1)),
        ("usb", "sda", (None, None)),
    ],
)
def test_a_disk_without_an_address_has_the_place_of_its_name(bus: str, name: str, place: tuple[Any, Any]) -> None:
    disk = f"<disk device='disk'><source file='a'/><target dev='{name}' bus='{bus}'/></disk>"
    found = read(smallest(devices=disk)).disks[0]
    assert (found.controller, found.unit) == place


def test_the_chip_behind_lsilogic_depends_on_the_hypervisor() -> None:
    controller = "<controller type='scsi' model='lsilogic'/>"
    assert read(smallest(devices=controller)).controllers[0].model == "lsi53c895a"
    assert read(smallest(devices=controller, kind="vmware")).controllers[0].model == "lsilogic"


BAD = {
    "<domain": "line 1: is not well-formed XML: unclosed token",
    "<network/>": "network: is not a domain",
    "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain>&a;</domain>": "line 1: has a DOCTYPE, which no configuration needs",
    "<domain><name>x</name></domain>": "os/type: '' is not hvm, a machine with its own kernel",
    "<domain><os><type>exe</type></os></domain>": "os/type: 'exe' is not hvm, a machine with its own kernel",
    smallest("<os><type arch='ppc64'>hvm</type></os>"): "os/type@arch: 'ppc64' is not i686, x86_64 or aarch64",
    smallest("<os firmware='x'><type>hvm</type></os>"): "os@firmware: 'x' is neither efi nor bios",
    smallest("<os><type>hvm</type><boot dev='x'/></os>"): "os/boot@dev: is not hd, cdrom, fd or network",
    smallest("<name>y</name>"): "name: the domain has 2 of it",
    smallest("<uuid>x</uuid>"): "uuid: 'x' is not a UUID",
    smallest("<memory>many</memory>"): "memory: 'many' is not a number from 0 to 1125899906842624",
    smallest("<memory unit='Mio'>1</memory>"): "memory@unit: 'mio' is not a unit of memory",
    smallest("<memory unit='ib'>1</memory>"): "memory@unit: 'ib' is not a unit of memory",
    smallest("<memory unit='E'>1000</memory>"): (
        "memory size: 1152921504606846976000: Input should be less than or equal to 1125899906842624"
    ),
    smallest("<vcpu>0</vcpu>"): "vcpu: '0' is not a number from 1 to 4096",
    smallest("<vcpu current='3'>2</vcpu>"): "vcpu@current: '3' is not a number from 1 to 2",
    smallest("<cpu><topology sockets='x'/></cpu>"): "cpu/topology@sockets: 'x' is not a number from 1 to 4096",
    smallest(devices="<disk device='disk'/>"): "devices/disk[1]/source: the disk has none",
    smallest(devices="<disk type='x'><source/></disk>"): "devices/disk[1]@type: 'x' is not a type of disk",
    smallest(devices="<disk><source file='a'/><boot order='0'/></disk>"): (
        "devices/disk[1]/boot@order: 0 is not a number from 1"
    ),
    smallest(devices="<disk><source file='a'/><address type='drive' unit='x'/></disk>"): (
        "devices/disk[1]/address@unit: 'x' is not a number from 0 to 65535"
    ),
    smallest(devices="<interface><mac address='52'/></interface>"): (
        "devices/interface[1]/mac: '52' is not a MAC address"
    ),
    smallest(devices="<interface><address type='pci' slot='0x20'/></interface>"): (
        "devices/interface[1]/address@slot: '0x20' is not up to 0x1f"
    ),
    smallest(devices="<tpm><backend version='3'/></tpm>"): "devices/tpm version: '3': Input should be '1.2' or '2.0'",
    smallest("<a/>" * 1001): "a: the domain has more than 1000 elements of this kind",
    smallest("<title>" + "x" * 70000 + "</title>"): (
        "domain extra.libvirt.title: '<title>xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...: "
        "String should have at most 65536 characters"
    ),
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_domains_are_refused_with_the_element_and_the_value(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(text)
    assert str(caught.value) == f"web.xml: {BAD[text]}"


def test_the_uuid_of_sysinfo_is_that_of_the_domain() -> None:
    entry = "<sysinfo type='smbios'><system><entry name='uuid'>{}</entry></system></sysinfo>"
    system = "<os><type>hvm</type><smbios mode='sysinfo'/></os><uuid>00000000-0000-0000-0000-000000000001</uuid>"
    read(smallest(system + entry.format("00000000-0000-0000-0000-000000000001")))
    with pytest.raises(ImageError, match="is not the domain's UUID"):
        read(smallest(system + entry.format("00000000-0000-0000-0000-000000000002")))


def scsi(model: str | None, os: str | None, kind: str) -> Machine:
    disk = Disk(file="a.vmdk", bus="scsi", controller=0, unit=0)
    controllers = (Controller(bus="scsi", index=0, model=model),)
    firmware = Firmware.model_validate({"kind": kind})
    return machine(os=GuestOS(id=os), firmware=firmware, controllers=controllers, disks=(disk,))


@pytest.mark.parametrize(
    ("model", "os", "firmware", "bus", "becomes"),
    [
        ("pvscsi", "win2k22", "bios", "scsi", "pvscsi"),
        ("pvscsi", "debian12", "uefi", "scsi", "virtio-scsi"),
        ("lsisas1068", "win2k22", "uefi", "sata", "ahci"),
        ("virtio-scsi", "win2k22", "uefi", "scsi", "virtio-scsi"),
        ("lsisas1068", None, "bios", "scsi", "lsisas1068"),
        ("lsilogic", "debian12", "bios", "scsi", "lsi53c895a"),
        ("lsilogic", "debian12", "uefi", "scsi", "virtio-scsi"),
        ("lsilogic", "win2k22", "bios", "sata", "ahci"),
        ("lsilogic", None, "uefi", "sata", "ahci"),
        ("lsi53c895a", "debian12", "uefi", "scsi", "virtio-scsi"),
        ("buslogic", "debian12", "bios", "scsi", "virtio-scsi"),
        ("hyperv-scsi", "win2k22", "uefi", "sata", "ahci"),
        (None, "debian12", "bios", "scsi", "lsi53c895a"),
    ],
)
def test_disks_move_to_a_controller_that_firmware_and_guest_know(
    model: str | None, os: str | None, firmware: str, bus: str, becomes: str
) -> None:
    result = adapted(scsi(model, os, firmware))
    assert result.machine.disks[0].bus == bus
    assert [each.model for each in result.machine.controllers] == [becomes]
    assert (model in (None, becomes)) == ("controllers[0].model" not in reasons(result) and bus == "scsi")


def test_nvme_and_ide_disks_move_where_the_platform_has_none() -> None:
    disks = (Disk(file="a", bus="nvme", controller=0, unit=0), Disk(file="b", bus="ide", controller=0, unit=0))
    bios = adapted(machine(disks=disks)).machine.disks
    assert [each.bus for each in bios] == ["sata", "ide"]
    uefi = adapted(machine(disks=disks, firmware=Firmware(kind="uefi")))
    assert [(each.bus, each.unit) for each in uefi.machine.disks] == [("sata", 0), ("sata", 1)]
    assert reasons(uefi)["disks[1].bus"] == ("ide", "sata")


@pytest.mark.parametrize("bus", ["virtio", "virtio-scsi", "sata", "ide"])
def test_a_bus_is_chosen_for_all_disks(bus: str) -> None:
    disks = tuple(Disk(file=f"{at}", bus="scsi", controller=0, unit=at) for at in range(3))
    result = adapted(machine(disks=disks), bus=bus).machine
    wanted = "scsi" if bus == "virtio-scsi" else bus
    assert {each.bus for each in result.disks} == {wanted}
    assert len({(each.controller, each.unit) for each in result.disks}) == 3


def test_disks_too_many_for_ide_go_to_sata() -> None:
    disks = tuple(Disk(file=f"{at}", bus="ide", controller=0, unit=at) for at in range(6))
    found = adapted(machine(disks=disks)).machine.disks
    assert [(each.bus, each.controller, each.unit) for each in found] == [
        *(("ide", 0, 0), ("ide", 0, 1), ("ide", 1, 0), ("ide", 1, 1)),
        *(("sata", 0, 0), ("sata", 0, 1)),
    ]


def test_too_many_disks_are_refused() -> None:
    disks = tuple(Disk(file=f"{at}", bus="sata") for at in range(97))
    with pytest.raises(PlanError, match="too many disks for the bus sata"):
        adapted(machine(disks=disks))
    assert len(adapted(machine(disks=disks), bus="virtio").machine.disks) == 97


def test_no_two_disks_have_one_place() -> None:
    disks = (
        Disk(file="moved", bus="nvme", controller=0, unit=0),
        Disk(file="stays", bus="sata", controller=0, unit=0),
        Disk(file="again", bus="sata", controller=0, unit=0),
    )
    found = adapted(machine(disks=disks)).machine.disks
    assert [each.unit for each in found] == [1, 0, 2]


@given(st.lists(st.sampled_from(["ide", "sata", "scsi", "nvme", "virtio", "usb"]), max_size=40))
def test_each_disk_has_a_place_of_its_own(buses: list[str]) -> None:
    disks = tuple(Disk.model_validate({"file": f"{at}", "bus": bus, "unit": 0}) for at, bus in enumerate(buses))
    found = [each for each in adapted(machine(disks=disks)).machine.disks if each.bus != "usb"]
    assert len({(each.bus, each.controller, each.unit) for each in found}) == len(found)


def test_a_machine_without_memory_cannot_exist() -> None:
    with pytest.raises(PlanError, match="states no memory size"):
        adapted(Machine(name="x"))


def test_devices_and_classes_become_one_boot_order() -> None:
    disks = (Disk(file="a", bus="sata", unit=0), Disk(file="b", bus="sata", unit=1, boot_index=7))
    drive = Removable(kind="cdrom", bus="sata", unit=2)
    firmware = Firmware(boot_order=("cdrom", "disk", "network"))
    subject = machine(disks=disks, removables=(drive,), nics=(Nic(),), firmware=firmware)
    found = adapted(subject).machine
    assert [each.boot_index for each in found.disks] == [2, 0]
    assert (found.removables[0].boot_index, found.nics[0].boot_index) == (1, 3)
    assert found.firmware.boot_order == ()
    orders = [each.get("order") for each in parse_xml(image_file(written(subject).encode(), "x")).iter("boot")]
    assert orders == ["3", "1", "2", "4"]


def test_boot_indexes_stay_where_each_is_used_once() -> None:
    disks = (Disk(file="a", bus="sata", unit=0, boot_index=3), Disk(file="b", bus="sata", unit=1, boot_index=1))
    assert [each.boot_index for each in adapted(machine(disks=disks)).machine.disks] == [3, 1]
    twice = tuple(each.model_copy(update={"boot_index": 0}) for each in disks)
    assert [each.boot_index for each in adapted(machine(disks=twice)).machine.disks] == [0, 1]


@pytest.mark.parametrize(
    ("nic", "kind", "name", "element"),
    [
        (Nic(network="br0", network_kind="bridged"), "bridged", "br0", '<source bridge="br0" />'),
        (Nic(network="VM Network", network_kind="bridged"), None, "VM Network", '<source network="VM Network" />'),
        (Nic(network_kind="bridged"), None, "default", '<source network="default" />'),
        (Nic(network="lan"), None, "lan", '<source network="lan" />'),
        (Nic(), None, "default", '<source network="default" />'),
        (Nic(network_kind="nat"), "nat", None, '<interface type="user">'),
        (Nic(network_kind="host-only"), None, "host-only", '<source network="host-only" />'),
        (Nic(network_kind="none"), "nat", None, '<link state="down" />'),
    ],
)
def test_networks_become_what_libvirt_can_express(nic: Nic, kind: str | None, name: str | None, element: str) -> None:
    subject = machine(nics=(nic,))
    found = adapted(subject).machine.nics[0]
    assert (found.network_kind, found.network) == (kind, name)
    assert element in written(subject)


def test_networks_are_chosen_by_options() -> None:
    subject = machine(nics=(Nic(network="VM Network", network_kind="bridged"),))
    assert '<source network="lan" />' in written(subject, network="lan")
    assert '<source bridge="br9" />' in written(subject, bridge="br9")


def test_cards_that_qemu_has_stay_and_others_change() -> None:
    models = ("vmxnet3", "e1000", "e1000e", "virtio", "pcnet32", "hyperv", "vlance", None)
    found = adapted(machine(nics=tuple(Nic(model=model) for model in models))).machine.nics
    assert [each.model for each in found] == [*models[:5], "e1000e", "e1000", "e1000"]


def test_files_of_the_source_host_are_no_serial_ports() -> None:
    ports = (Serial(index=0, kind="file", target="/etc/cron.d/x"), Serial(index=1, kind="network", target="file:x"))
    text = written(machine(serials=ports))
    assert "cron" not in text and "file:x" not in text and text.count('<serial type="pty">') == 2


def test_uefi_without_a_word_on_secure_boot_gets_none() -> None:
    # libvirt would choose a firmware with Secure Boot on where one is installed.
    assert '<feature enabled="no" name="secure-boot" />' in written(machine(firmware=Firmware(kind="uefi")))


def test_secure_boot_brings_smm_and_q35() -> None:
    text = written(machine(firmware=Firmware(secure_boot=True)))
    assert '<smm state="on" />' in text and 'machine="q35"' in text and '<loader secure="yes" />' in text


def test_names_of_disks_are_below_the_directory_of_the_options() -> None:
    subject = machine(
        disks=(Disk(file="a.qcow2", format="qcow2"), Disk(device="/dev/sdb"), Disk(file="b", format="vhd"))
    )
    text = written(subject, directory="/srv/web")
    assert 'file="/srv/web/a.qcow2"' in text and 'dev="/dev/sdb"' in text and 'type="vpc"' in text
    assert 'file="a.qcow2"' in written(subject)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"directory": "a"}, "directory is not an absolute path"),
        ({"network": "a", "bridge": "b"}, "exclude each other"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Options(**options)  # type: ignore[arg-type]


REFUSED = {
    "libvirt/xml2vmxdata/xml2vmx-cdrom-ide-raw-auto-detect.xml": "devices/disk[1]/source: the disk has none",
    "libvirt/xml2vmxdata/xml2vmx-cdrom-scsi-raw-auto-detect.xml": "devices/disk[1]/source: the disk has none",
}
"""A drive that VMware's host chooses has no source."""


def test_domains_of_the_corpus_are_read_or_refused_with_the_reason() -> None:
    refused: dict[str, str] = {}
    domains = configurations(".xml")
    for name, content in domains.items():
        try:
            found = read(content)
        except ImageError as exc:
            refused[name] = str(exc).removeprefix("web.xml: ")
            continue
        root = parse_xml(image_file(content, name))
        drives = [each.file or each.device for each in found.disks]
        drives += [each.file or each.device for each in found.removables]
        sources = [next(iter(each.attrib.values())) for each in root.findall("devices/disk/source") if each.attrib]
        assert sorted(filter(None, drives)) == sorted(source for source in sources if source != "optional"), name
        assert [each.mac for each in found.nics] == [
            str(each.get("address")).lower() for each in root.findall("devices/interface/mac")
        ], name
        memory = root.find("memory")
        assert memory is not None and found.memory.size == int(memory.text or "") << 10, name
        again = read(LIBVIRT.write(adapted(found).machine, Options())[-1].content)
        assert again.identity == found.identity, name
    assert len(domains) == 65
    assert refused == REFUSED
