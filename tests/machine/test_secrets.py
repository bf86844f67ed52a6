"""Secrets in a configuration of each platform do not reach a new configuration, nor the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmconv
from support.hyperv_machines import ETHERNET, NIC
from support.hyperv_storage import storage
from vmconv.errors import PlanError
from vmconv.machine import Machine
from vmconv.machine.secrets import without_secrets

VMX = """.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "13"
displayName = "a"
guestOS = "debian10-64"
memsize = "512"
RemoteDisplay.vnc.enabled = "TRUE"
RemoteDisplay.vnc.key = "hunter2"
RemoteDisplay.vnc.password = "hunter2"
guestinfo.admin.password = "hunter2"
guestinfo.hostname = "kept-name"
dataFileKey = "hunter2"
"""
LIBVIRT = """<domain type='kvm'><name>a</name><memory unit='MiB'>512</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><on_crash>preserve</on_crash>
<devices><graphics type='vnc' port='-1' passwd='hunter2' passwdValidTo='2030-01-01T00:00:00'/>
<graphics type='spice' passwd='hunter2'/></devices>
<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<qemu:env name='A_SECRET' value='hunter2'/></qemu:commandline>
<launchSecurity type='sev'><session>hunter2</session></launchSecurity></domain>"""
PROXMOX = """name: a
memory: 512
cores: 1
scsihw: virtio-scsi-pci
cipassword: $5$hunter2
sshkeys: ssh-rsa%20hunter2
ciuser: kept-name
"""
VBOX = """<?xml version="1.0"?>
<VirtualBox xmlns="http://www.virtualbox.org/" version="1.19-linux">
<Machine uuid="{12345678-1234-1234-1234-123456789abc}" name="a" OSType="Debian_64"><ExtraData>
<ExtraDataItem name="VBoxAuthSimple/users/root" value="hunter2"/>
<ExtraDataItem name="VBoxInternal/Devices/x/Password" value="hunter2"/>
<ExtraDataItem name="GUI/LastCloseAction" value="kept-name"/></ExtraData>
<Hardware><Memory RAMSize="512"/><RemoteDisplay enabled="true" authType="External"><VRDEProperties>
<Property name="VNCPassword" value="hunter2"/></VRDEProperties></RemoteDisplay>
<GuestProperties><GuestProperty name="/root/password" value="hunter2" timestamp="1" flags=""/></GuestProperties>
</Hardware></Machine></VirtualBox>"""
KUBEVIRT = """apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {name: a, labels: {x: kept-name}}
spec:
  running: false
  template:
    spec:
      accessCredentials:
      - userPassword: {source: {secret: {secretName: s}}, propagationMethod: {qemuGuestAgent: {}}}
      domain:
        devices: {disks: [{name: ci, disk: {bus: virtio}}]}
        resources: {requests: {memory: 512Mi}}
      volumes: [{name: ci, cloudInitNoCloud: {userData: "password: hunter2"}}]
"""
OVF = """<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:vmw="http://www.vmware.com/schema/ovf"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
<References/><VirtualSystem ovf:id="a"><Info>x</Info><ProductSection><Info>x</Info>
<Property ovf:key="root" ovf:type="string" ovf:password="true" ovf:userConfigurable="true" ovf:value="hunter2"/>
<Property ovf:key="admin_password" ovf:type="string" ovf:value="hunter2"/>
<Property ovf:key="host" ovf:type="string" ovf:value="kept-name"/></ProductSection>
<VirtualHardwareSection><Info>x</Info><Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>
<rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item><Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
<rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType>
<rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item>
<vmw:ExtraConfig vmw:key="RemoteDisplay.vnc.password" vmw:value="hunter2"/></VirtualHardwareSection>
</VirtualSystem></Envelope>"""

_SPEC = "spec.template.spec"
HYPERV = {
    "configuration": {
        "properties": {"name": "a", "subtype": 1, "AdminPassword": "hunter2"},
        "settings": {
            "memory": {"bank": {"size": 512}},
            "processors": {"count": 1},
            "security": {"KeyProtectorSecret": "hunter2", "private_key": "hunter2"},
        },
        "manifest": {"vdev001": {"device": ETHERNET, "instance": NIC, "name": "Synthetic Ethernet Port"}},
        f"_{NIC.lower()}_": {"Connection": {"AltSwitchName": "kept-name", "AuthTokenKey": "hunter2"}},
    }
}

SOURCES: dict[str, tuple[str, str | bytes, list[str]]] = {
    "hyperv": (
        "a.vmcx",
        storage(HYPERV),
        ["properties/AdminPassword", "settings/security/KeyProtectorSecret", "settings/security/private_key"],
    ),
    "vmx": ("a.vmx", VMX, ["RemoteDisplay.vnc.key", "RemoteDisplay.vnc.password", "dataFileKey"]),
    "libvirt": ("a.xml", LIBVIRT, ["devices.graphics", "devices.graphics.1", "launchSecurity"]),
    "proxmox": ("a.conf", PROXMOX, ["cipassword", "sshkeys"]),
    "vbox": ("a.vbox", VBOX, ["ExtraData:VBoxAuthSimple/users/root", "GuestProperties/GuestProperty@value"]),
    "kubevirt": ("a.yaml", KUBEVIRT, [f"{_SPEC}.accessCredentials", f"{_SPEC}.volumes[0].cloudInitNoCloud.userData"]),
    "ovf": ("a.ovf", OVF, ["root", "admin_password", "extraConfig.RemoteDisplay.vnc.password"]),
}


PAIRS = [
    (source, target)
    for source in SOURCES
    for target in SOURCES
    # These have no place for the volume with the password.
    if source != "kubevirt" or target not in ("proxmox", "vbox", "ovf")
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids="-".join)
def test_no_secret_reaches_a_new_machine(source: str, target: str, tmp_path: Path) -> None:
    name, text, lost = SOURCES[source]
    config = tmp_path / name
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = vmconv.machine_convert(config, tmp_path / "new", source_format=source, target_format=target)
    for path in (tmp_path / "new").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in repr(result.plan)
    assert {loss.value for loss in result.plan.losses} >= set(lost)
    # What is no secret stays.
    if source == target and source != "libvirt":
        assert b"kept-name" in Path(result.target).read_bytes()
    if lost:
        with pytest.raises(PlanError, match=r"set it again") as caught:
            vmconv.machine_convert(config, tmp_path / "other", source_format=source, target_format=target, strict=True)
        assert "hunter2" not in str(caught.value)


def test_what_is_no_secret_stays() -> None:
    machine = Machine(
        extra={
            "vmx": {"pciBridge0.present": "TRUE", "RemoteDisplay.vnc.port": "5900"},
            "kubevirt": {"a": '{"secretName": "x"}', "b": '{"secretRef": {"name": "y"}}'},
            "ovf": {"property.password.password": "false", "property.password.type": "string"},
            "vbox": {"RemoteDisplay/Property@name": "TCP/Ports", "RemoteDisplay/Property@value": "3389"},
        }
    )
    assert without_secrets(machine) == (machine, ())
