"""Names of the open virtualization format: namespaces, CIM resource types, and subtypes with their neutral words.

DMTF DSP0243 (OVF 1.1.1 and 2.1.1), CIM_ResourceAllocationSettingData.ResourceType, and for `vmware.*` subtypes
the hardware items that VMware's products export.
"""

from __future__ import annotations

ENVELOPES = {
    "http://schemas.dmtf.org/ovf/envelope/1": "1",
    "http://schemas.dmtf.org/ovf/envelope/2": "2",
    "http://www.vmware.com/schema/ovf/1/envelope": "0.9",
    "http://schemas.dmtf.org/ovf/1/envelope": "0.9",
}
"""Namespaces of the envelope and the version of OVF."""

OVF = "http://schemas.dmtf.org/ovf/envelope/1"
RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
VMW = "http://www.vmware.com/schema/ovf"
VBOX = "http://www.virtualbox.org/ovf/machine"
XSI = "http://www.w3.org/2001/XMLSchema-instance"

OTHER, PROCESSOR, MEMORY, IDE, SCSI = 1, 3, 4, 5, 6
ETHERNET, FLOPPY, CD, DVD, DISK = 10, 14, 15, 16, 17
OTHER_STORAGE, SERIAL, USB, GRAPHICS, SOUND = 20, 21, 23, 24, 35
NVRAM = 32768
"""VirtualBox's own resource type for the file of EFI variables."""

SCSI_MODELS = {
    "buslogic": "buslogic",
    "lsilogic": "lsilogic",
    "lsilogicsas": "lsisas1068",
    "lsilogic-sas": "lsisas1068",
    "virtualscsi": "pvscsi",
    "pvscsi": "pvscsi",
    "virtio-scsi": "virtio-scsi",
    "virtioscsi": "virtio-scsi",
}
IDE_MODELS = {"piix3": "piix3", "piix4": "piix4", "ich6": "ich6"}
STORAGE = {
    "ahci": ("sata", "ahci"),
    "vmware.sata.ahci": ("sata", "ahci"),
    "nvme": ("nvme", "nvme"),
    "vmware.nvme.controller": ("nvme", "nvme"),
    "virtioscsi": ("scsi", "virtio-scsi"),
    "usb": ("usb", None),
}
"""Subtypes of `OTHER_STORAGE`: bus and model of the controller."""

NIC_MODELS = {
    "e1000": "e1000",
    "e1000e": "e1000e",
    "pcnet32": "pcnet32",
    "vmxnet": "vmxnet",
    "vmxnet2": "vmxnet2",
    "vmxnet3": "vmxnet3",
    "virtio": "virtio",
}
SOUND_MODELS = {
    "ensoniq1371": "es1371",
    "vmware.soundcard.ensoniq1371": "es1371",
    "vmware.soundcard.hdaudio": "hda",
    "vmware.soundcard.sb16": "sb16",
}
BOOT_CLASSES = {"disk": "hdd", "cdrom": "cdrom", "floppy": "floppy", "network": "ethernet0"}
"""Neutral classes of boot devices and their words in VMware's `bios.bootOrder`."""

WRITTEN_SCSI = {"buslogic": "buslogic", "lsilogic": "lsilogic", "lsisas1068": "lsilogicsas", "pvscsi": "VirtualSCSI"}
WRITTEN_IDE = {"piix3": "PIIX3", "piix4": "PIIX4", "ich6": "ICH6"}
# VirtualBox knows only this word for AHCI; VMware takes it too.
WRITTEN_STORAGE = {"sata": "AHCI", "nvme": "vmware.nvme.controller"}
WRITTEN_NIC = {
    "e1000": "E1000",
    "e1000e": "E1000e",
    "pcnet32": "PCNet32",
    "vmxnet": "VmxNet",
    "vmxnet2": "VmxNet2",
    "vmxnet3": "VmxNet3",
}
WRITTEN_SOUND = {
    "es1371": "vmware.soundcard.ensoniq1371",
    "hda": "vmware.soundcard.hdaudio",
    "sb16": "vmware.soundcard.sb16",
}
VTPM = "vmware.vtpm"
PASSTHROUGH = ("vmware.pci.passthrough", "vmware.scsi.passthrough")

PRODUCT = ("Product", "Vendor", "Version", "FullVersion", "ProductUrl", "VendorUrl", "AppUrl")
"""Texts of a ProductSection, in the order of the schema."""

PROPERTY = ("type", "qualifiers", "userConfigurable", "password", "required")
"""Attributes of a Property that have no neutral meaning."""

FORMATS = (("vmdk", "vmdk"), ("qcow", "qcow2"), ("vhdx", "vhdx"), ("vhd", "vhd"), ("bb676673", "vhd"), ("vdi", "vdi"))
"""Parts of the URIs of disk formats, in lower case, and the names of the formats."""

_VMDK = "http://www.vmware.com/interfaces/specifications/vmdk.html"
WRITTEN_FORMATS = {"sparse": f"{_VMDK}#sparse", "streamOptimized": f"{_VMDK}#streamOptimized"}

KNOWN_SECTIONS = frozenset(
    {
        *("References", "Strings", "Info", "Name", "Description", "Label", "Category"),
        *("DiskSection", "NetworkSection", "ResourceAllocationSection", "AnnotationSection", "ProductSection"),
        *("EulaSection", "StartupSection", "DeploymentOptionSection", "OperatingSystemSection", "InstallSection"),
        *("VirtualHardwareSection", "EnvironmentFilesSection", "BootDeviceSection", "SharedDiskSection"),
        *("ScaleOutSection", "PlacementGroupSection", "PlacementSection", "EncryptionSection"),
    }
)
"""Sections of the envelope's own namespace. DSP0243, 9: others may be ignored only if they are not required."""

KNOWN_NAMESPACES = (f"{{{VMW}}}", "{http://www.vmware.com/vcloud/", "{http://schemas.dmtf.org/ovf/strings/1}")
"""Namespaces of sections that say nothing about a machine's hardware, but for VMware's boot order."""
