"""KubeVirt's VirtualMachine objects: the conformance kit, what is read, what changes, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar
from uuid import UUID

import pytest
import yaml

from support.machine_documents import KUBEVIRT as KUBEVIRT_MACHINE
from vmconv.errors import ImageError, PlanError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.machine import (
    Board,
    Controller,
    Cpu,
    Disk,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nic,
    Removable,
    Tpm,
)
from vmconv.plugin import Adapted
from vmconv.testing import MachineTests
from vmconv.testing.disks import image_file
from vmconv_kubevirt import Kubevirt
from vmconv_kubevirt.options import Options

KUBEVIRT = Kubevirt()


class TestKubevirt(MachineTests):
    format = KUBEVIRT


class TestKubevirtOptions(MachineTests):
    format = KUBEVIRT
    options: ClassVar = {"bus": "virtio", "network": "vms/lan", "namespace": "vms", "running": True}


def read(text: str | bytes) -> Machine:
    content = text.encode() if isinstance(text, str) else text
    with Opener(installed()) as opener:
        return KUBEVIRT.read(image_file(content, "web.yaml"), opener)


def adapted(subject: Machine, **options: Any) -> Adapted:
    return KUBEVIRT.adapt(subject, Options(**options))


def machine(**values: Any) -> Machine:
    return Machine(**{"name": "x", "memory": Memory(size=1 << 30), **values})


def written(subject: Machine, **options: Any) -> str:
    return KUBEVIRT.write(adapted(subject, **options).machine, Options(**options))[-1].content.decode()


def objects(subject: Machine, **options: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(written(subject, **options)))


def reasons(result: Adapted) -> dict[str, tuple[str, str]]:
    return {each.path: (each.before, each.after) for each in result.substitutions}


def smallest(domain: str = "{}", spec: str = "") -> str:
    """Returns a machine with this domain, and further lines of its spec."""
    head = "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nmetadata: {name: x}\n"
    return f"{head}spec:\n  template:\n    spec:\n      domain: {domain}\n{spec}"


def test_it_claims_virtual_machines_in_yaml_and_json() -> None:
    for text in (KUBEVIRT_MACHINE, '{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine"}', smallest()):
        assert KUBEVIRT.probe(image_file(text.encode(), "x"))
    for text in (
        "kind: VirtualMachine",
        KUBEVIRT_MACHINE.replace("kind: VirtualMachine", "kind: VirtualMachineInstance"),
    ):
        assert not KUBEVIRT.probe(image_file(text.encode(), "x"))


def test_settings_of_a_virtual_machine_are_read() -> None:
    found = read(KUBEVIRT_MACHINE)
    assert (found.name, found.description) == ("web", "a\nb")
    assert found.os == GuestOS(id="win2k22", architecture="x86_64")
    assert found.cpu == Cpu(count=8, sockets=4, cores=2, threads=1, model="host-model")
    assert found.memory == Memory(size=2 << 30)
    assert found.firmware == Firmware(kind="uefi", secure_boot=True)
    uuid = UUID("421f245c-7fa8-60fa-8b8d-c3a4bd2b2f0d")
    assert found.identity == Identity(uuid=uuid, serial="VMware-42", chassis_serial="C", asset_tag="A")
    assert found.board == Board(chipset="q35", clock="utc")
    assert (found.sound, found.watchdog, found.rng, found.tpm) == ("ac97", "i6300esb", True, Tpm(version="2.0"))
    assert found.passthrough == ("nvidia.com/GP102",)


def test_devices_of_a_virtual_machine_are_read() -> None:
    found = read(KUBEVIRT_MACHINE)
    root = Disk(file="data.qcow2", format="qcow2", capacity=10 << 30, bus="virtio", boot_index=0, serial="S1")
    claim = Disk(device="persistentVolumeClaim:shared", bus="scsi", shared=True)
    assert found.disks == (root, claim, Disk(capacity=1_500_000_000))
    assert found.removables == (Removable(kind="cdrom", device="containerDisk:registry/tools:1", bus="sata"),)
    assert found.nics == (
        Nic(mac="52:54:00:aa:bb:cc", model="e1000", network_kind="nat"),
        Nic(network="vms/lan", network_kind="bridged", connected=False, boot_index=1),
    )


_UNKNOWN = (
    "spec.template.spec.domain.clock.timer",
    "spec.template.spec.domain.firmware.bootloader.efi.persistent",
    "spec.template.spec.domain.devices.hostDevices[0].name",
    "spec.template.spec.domain.devices.watchdog.i6300esb.action",
)


def test_objects_beside_a_machine_and_their_unknown_fields_are_named() -> None:
    beside = (
        "---\nkind: Secret\nmetadata: {name: s}\ndata: {password: eA==}\n"
        "---\nkind: DataVolume\nmetadata: {name: web-data}\nspec: {source: {http: {url: u}}, storage: {}}\n"
    )
    found = read(KUBEVIRT_MACHINE + beside).extra["kubevirt"]
    assert found["Secret s"] == "an object beside the machine"
    assert found["DataVolume web-data: spec.source"] == '{"http": {"url": "u"}}'


def test_a_machine_without_cards_gets_the_one_that_kubevirt_adds() -> None:
    assert read(smallest("{}")).nics == (Nic(model="virtio", network_kind="nat"),)
    assert read(smallest("{devices: {autoattachPodInterface: false}}")).nics == ()


def test_settings_without_a_neutral_meaning_are_written_again() -> None:
    found = read(KUBEVIRT_MACHINE)
    assert set(found.extra["kubevirt"]) == {
        *("metadata.namespace", "metadata.labels", "spec.runStrategy", "spec.template.spec.nodeSelector"),
        "spec.template.spec.domain.features",
        *_UNKNOWN,
    }
    result = adapted(found)
    assert {each.before for each in result.substitutions if each.path == "extra.kubevirt"} == set(_UNKNOWN)
    again = read(KUBEVIRT.write(result.machine, Options())[-1].content)
    assert again.extra == result.machine.extra
    root = objects(found)[0]
    assert root["spec"]["template"]["spec"]["domain"]["features"] == {
        "acpi": {},
        "smm": {"enabled": True},
        "hyperv": {"relaxed": {}},
    }
    assert {each["metadata"]["namespace"] for each in objects(found)} == {"vms"}


def test_other_settings_are_not_taken_over() -> None:
    extra = {"kubevirt": {"spec.template.spec.volumes": "[]", "metadata.labels": "not json"}}
    result = adapted(machine(extra=extra))
    assert result.machine.extra == {}
    assert [each.before for each in result.substitutions] == ["spec.template.spec.volumes", "metadata.labels"]


def test_each_disk_has_a_volume_to_upload_it_to() -> None:
    disks = (Disk(file="a.qcow2", format="qcow2", capacity=10 << 30), Disk(device="/dev/sdb"), Disk(capacity=5))
    root, volume = objects(machine(disks=disks), storage_class="fast")
    assert root["spec"]["template"]["spec"]["volumes"] == [
        {"name": "disk-1", "dataVolume": {"name": "x-disk-1"}},
        {"name": "disk-2", "persistentVolumeClaim": {"claimName": "dev-sdb"}},
        {"name": "disk-3", "emptyDisk": {"capacity": "5"}},
    ]
    assert volume["metadata"] == {
        "name": "x-disk-1",
        "annotations": {"vmconv/file": "a.qcow2", "vmconv/format": "qcow2"},
    }
    assert volume["spec"] == {
        "source": {"upload": {}},
        "storage": {"resources": {"requests": {"storage": "10Gi"}}, "storageClassName": "fast"},
    }
    assert read(written(machine(disks=disks))).disks[1].device == "/dev/sdb"


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("web", "web"),
        ("Web Server_1", "web-server-1"),
        ("-ünï-", "n"),
        ("名前", "machine"),
        (None, "machine"),
        ("a" * 49 + "-b", "a" * 49),
    ],
)
def test_names_become_labels(name: str | None, after: str) -> None:
    result = adapted(machine(name=name))
    assert result.machine.name == after
    assert ("name" in reasons(result)) == (name not in (None, after))


@pytest.mark.parametrize(
    ("bus", "model", "os", "after"),
    [
        ("virtio", None, None, "virtio"),
        ("ide", None, "debian12", "sata"),
        ("nvme", None, "debian12", "sata"),
        ("scsi", "pvscsi", "debian12", "scsi"),
        ("scsi", "pvscsi", "win2k22", "sata"),
        ("scsi", "virtio-scsi", "win2k22", "scsi"),
        (None, None, None, "sata"),
    ],
)
def test_disks_move_to_a_bus_of_kubevirt(bus: Any, model: str | None, os: str | None, after: str) -> None:
    disk = Disk(file="a", bus=bus, controller=0, unit=0)
    controllers = (Controller(bus="scsi", model=model),) if model else ()
    subject = machine(os=GuestOS(id=os), disks=(disk,), controllers=controllers)
    assert adapted(subject).machine.disks[0].bus == after
    assert adapted(subject, bus="virtio").machine.disks[0].bus == "virtio"


@pytest.mark.parametrize(
    ("os", "model", "after"),
    [("debian12", "vmxnet3", "virtio"), ("win2k22", "vmxnet3", "e1000e"), (None, "e1000", "e1000")],
)
def test_cards_that_kubevirt_lacks_change(os: str | None, model: str, after: str) -> None:
    subject = machine(os=GuestOS(id=os), nics=(Nic(model=model),))
    result = adapted(subject)
    assert result.machine.nics[0].model == after
    assert ("nics[0].model" in reasons(result)) == (model != after)


def test_one_card_joins_the_network_of_the_pod() -> None:
    nics = (Nic(), Nic(), Nic(network="VM Network"), Nic(network="vms/lan", network_kind="bridged"))
    found = adapted(machine(nics=nics)).machine.nics
    assert [(each.network_kind, each.network) for each in found] == [
        ("nat", None),
        ("bridged", "network-2"),
        ("bridged", "vm-network"),
        ("bridged", "vms/lan"),
    ]
    assert {each.network for each in adapted(machine(nics=nics), network="a/b").machine.nics} == {"a/b"}


def test_devices_and_classes_become_one_boot_order() -> None:
    disks = (Disk(file="a"), Disk(file="b", boot_index=4))
    subject = machine(disks=disks, nics=(Nic(),), firmware=Firmware(boot_order=("cdrom", "network", "disk")))
    result = adapted(subject)
    assert [each.boot_index for each in result.machine.disks] == [2, 0]
    assert result.machine.nics[0].boot_index == 1
    assert reasons(result)["firmware.boot_order"] == ("cdrom, network, disk", "")


def test_secure_boot_is_off_unless_the_source_states_it() -> None:
    def firmware(kind: Any, secure: bool | None) -> Any:
        root = objects(machine(firmware=Firmware(kind=kind, secure_boot=secure)))[0]
        return root["spec"]["template"]["spec"]["domain"]["firmware"]["bootloader"]

    assert firmware("uefi", None) == {"efi": {"secureBoot": False}}
    assert firmware("uefi", True) == {"efi": {"secureBoot": True}}
    assert firmware(None, None) == {"bios": {}}


def test_serials_that_kubevirt_refuses_are_dropped_with_a_reason() -> None:
    subject = machine(identity=Identity(serial="VMware-42 1f"), disks=(Disk(file="a", serial="a/b"),))
    result = adapted(subject)
    assert result.machine.identity.serial is None and result.machine.disks[0].serial is None
    assert reasons(result)["identity.serial"] == ("VMware-42 1f", "")


def test_a_machine_without_memory_or_with_too_many_processors_cannot_exist() -> None:
    with pytest.raises(PlanError, match="states no memory size"):
        adapted(Machine(name="x"))
    with pytest.raises(PlanError, match="has 65536 processors"):
        adapted(machine(cpu=Cpu(sockets=256, cores=256)))


BAD = {
    "a: [": "line 2: did not find expected node content",
    "kind: Pod": "kind: the file has 0 objects VirtualMachine",
    f"{smallest()}---\n{smallest()}": "kind: the file has 2 objects VirtualMachine",
    "- a": "a document is ['a'], not an object",
    "a: &a [x]\nb: *a": "line 1: has an anchor or an alias, which no object needs",
    "a: *a": "line 1: has an anchor or an alias, which no object needs",
    "a: !!python/object/apply:os.system ['x']": (
        "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"
    ),
    "a: !secret x": "line 1: has the tag '!secret', which no object needs",
    "a: 1\na: 2": "line 2: key 'a' is repeated, or no text",
    "{[a]: 1}": "line 1: key [ScalarNode(tag='tag:yaml.org,2002:str', value='a')] is repeated, or no text",
    "[" * 70: "line 1: is nested deeper than 60",
    "a: [" + "1," * 100_001 + "]": "line 1: has more than 100000 values",
    "a: " + "1" * 5000: (
        "is not YAML: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; "
        "use sys.set_int_max_str_digits() to increase the limit"
    ),
    "#" * ((2 << 20) + 1): "has 2097153 bytes, and Kubernetes takes at most 2097152",
    smallest("[]"): "domain: [] has the wrong type",
    smallest("{memory: {guest: 2 GB}}"): "memory.guest: '2 GB' is not a number of bytes",
    smallest("{memory: {guest: 1e99}}"): "memory.guest: '1e99' is not a number of bytes",
    smallest("{memory: {guest: 9999999999E}}"): "memory.guest: '9999999999E' is not a number of bytes",
    smallest("{memory: {guest: true}}"): "memory.guest: True has the wrong type",
    smallest("{cpu: {cores: two}}"): "cores: 'two' has the wrong type",
    smallest("{cpu: {cores: 0}}"): "cpu count: 0: Input should be greater than or equal to 1",
    smallest("{firmware: {uuid: x}}"): "firmware.uuid: 'x' is not a UUID",
    smallest("{devices: {disks: [a]}}"): "disks: 'a' is not an object",
    smallest("{devices: {disks: [{name: a, disk: {}}]}}"): "disks[0]: volume 'a' is not there",
    smallest("{devices: {disks: [{name: a, bootOrder: 0}]}}"): "disks[0].bootOrder: 0 is not a number from 1",
    smallest("{devices: {interfaces: [{macAddress: x}]}}"): "interfaces[0].macAddress: 'x' is not a MAC address",
    smallest(spec="      architecture: s390x"): "architecture: 's390x' is not amd64 or arm64",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_objects_are_refused_with_the_field_and_the_value(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(text)
    assert str(caught.value) == f"web.yaml: {BAD[text]}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("namespace", bad) for bad in ("", "A", "a_b", "-a", "a.b", "x" * 64, "a\n")),
        *(("storage_class", bad) for bad in ("", "x: y", "a/b", "x" * 254, "a\n")),
        *(("network", bad) for bad in ("", "a/b/c", "/a", "a/", "A/b", "a.b/c")),
    ],
)
def test_options_that_are_no_names_of_objects_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        Options(**{name: value})


def test_names_of_objects_are_taken() -> None:
    Options(namespace="a-1", storage_class="ceph.rbd-2", network="a-1/lan.b")
