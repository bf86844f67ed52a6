"""The neutral description of a virtual machine, as a pydantic schema.

Readers fill it in and writers express it in their format. None and empty tuples mean that the source does not say.
Fields are named by dotted paths, such as `cpu.count` and `nics[1].mac`; see `vmconv.machine.paths`.

Disk conversions do not import this module, because importing pydantic takes longer than converting a disk.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Literal, NamedTuple
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from vmconv.model.extents import MAX_SIZE

MAX_DEVICES = 1024
"""Devices of one kind."""

MAX_LAYERS = 200
"""Layers of a disk, as in chains of images."""


def _without_controls(text: str) -> str:
    """Returns the text with line feeds as its only control characters; raises `ValueError` for any other."""
    text = text.replace("\r\n", "\n").replace("\t", " ")
    found = re.search("[^\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
    if found:
        raise ValueError(f"has the character {found[0]!r}, which configurations cannot hold")
    return text


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("has a line break")
    return text


Text = Annotated[str, StringConstraints(max_length=1 << 16, strip_whitespace=True), AfterValidator(_without_controls)]
"""Text that people write, with line feeds; white space around it is removed."""

Word = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1024, strip_whitespace=True),
    AfterValidator(_without_controls),
    AfterValidator(_one_line),
]
"""One line: a name, a model, a path; white space around it is removed."""

Index = Annotated[int, Field(ge=0, lt=1 << 16)]

Bus = Literal["ide", "sata", "scsi", "nvme", "virtio", "usb", "floppy"]
CONTROLLER_MODELS = (
    *("buslogic", "lsilogic", "lsisas1068", "pvscsi", "virtio-scsi", "hyperv-scsi"),
    *("piix3", "piix4", "ich6", "ahci", "nvme", "virtio-blk"),
)
NIC_MODELS = (
    *("e1000", "e1000e", "vmxnet2", "vmxnet3", "virtio"),
    *("pcnet32", "rtl8139", "ne2k", "hyperv", "hyperv-legacy"),
)
Clock = Literal["utc", "localtime"]
BootClass = Literal["disk", "cdrom", "floppy", "network"]


class ByCore(Enum):
    """Marks a field that a conversion sets itself, or whose loss is reported in another way."""

    FIELD = "by core"


class Unless(NamedTuple):
    """Marks a field that is no loss if the machine states another field beside it, which says the same."""

    stated: str


class About(NamedTuple):
    """Marks a field that is no loss if another field beside it is carried, which it says something about."""

    carried: str


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class GuestOS(_Part):
    """The operating system in the guest."""

    id: Word | None = None
    """The short id of libosinfo, such as `debian12` or `win2k22`."""
    architecture: Literal["i686", "x86_64", "aarch64"] | None = None
    source_id: Annotated[Word | None, Unless("id")] = None
    """The id in the terms of the source, such as `debian12-64`."""


class Cpu(_Part):
    """Processors. `count` is what the guest sees: sockets x cores x threads where all three are known."""

    count: Annotated[int, Field(ge=1, le=4096)] | None = None
    sockets: Annotated[int, Field(ge=1, le=4096)] | None = None
    cores: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Cores per socket."""
    threads: Annotated[int, Field(ge=1, le=64)] | None = None
    """Threads per core."""
    model: Word | None = None
    hot_add: bool | None = None


class Memory(_Part):
    """Main memory, in bytes."""

    size: Annotated[int, Field(ge=1, le=1 << 50)] | None = None
    max: Annotated[int, Field(ge=1, le=1 << 50)] | None = None
    hot_add: bool | None = None


class Nvram(_Part):
    """The file with the firmware's variables, by its name in the configuration."""

    file: Annotated[Word, ByCore.FIELD]
    kind: Annotated[Literal["ovmf", "virtualbox", "vmware", "vmgs"], ByCore.FIELD]


class Firmware(_Part):
    """Firmware and what it starts. Devices with a `boot_index` come first, in its order; then the classes."""

    kind: Literal["bios", "uefi"] | None = None
    secure_boot: bool | None = None
    nvram: Nvram | None = None
    boot_order: tuple[BootClass, ...] = ()


class Tpm(_Part):
    """A virtual TPM; `state` is the file with its secrets, where the configuration names one."""

    version: Literal["1.2", "2.0"] | None = None
    state: Annotated[Word | None, ByCore.FIELD] = None


class Identity(_Part):
    """What the guest and its licences know the machine by.

    `uuid` is the system UUID of SMBIOS, as the guest reads it: its 16 bytes in the table are `uuid.bytes_le` (SMBIOS
    2.6, 7.2.1). `uuid_text` is what the source's configuration shows, if that differs.
    """

    uuid: UUID | None = None
    uuid_text: Annotated[UUID | None, ByCore.FIELD] = None
    instance_uuid: UUID | None = None
    generation_id: UUID | None = None
    """The VM generation ID of Windows; Microsoft, "Virtual Machine Generation ID"."""
    serial: Word | None = None
    board_serial: Word | None = None
    chassis_serial: Word | None = None
    manufacturer: Word | None = None
    product: Word | None = None
    asset_tag: Word | None = None


class Board(_Part):
    """The machine around the processors."""

    chipset: Literal["i440fx", "q35", "virt"] | None = None
    hardware_version: Word | None = None
    """In the terms of the source, such as `vmx-19`."""
    clock: Clock | None = None


class Controller(_Part):
    """A controller of disks. Devices refer to it by bus and index."""

    bus: Bus
    index: Index = 0
    model: Word | None = None
    """One of `CONTROLLER_MODELS`, or the source's own word for any other."""
    pci_slot: Word | None = None


class _Attached(_Part):
    """A device at a controller; `controller` is the index of the controller on its bus, `unit` the place there."""

    bus: Bus | None = None
    controller: Index | None = None
    unit: Index | None = None
    boot_index: Index | None = None


class Layer(_Part):
    """An image below a disk's own file, in the terms of `Disk`."""

    file: Annotated[Word, ByCore.FIELD]
    format: Annotated[Word | None, ByCore.FIELD] = None
    image_uuid: Annotated[UUID | None, ByCore.FIELD] = None


class Disk(_Attached):
    """A disk: a file by its name in the configuration, or a physical device that is only named.

    `file` None and `device` None mean an empty disk of `capacity` bytes that the target has to create.
    """

    file: Annotated[Word | None, ByCore.FIELD] = None
    format: Annotated[Word | None, ByCore.FIELD] = None
    """The name of the disk format, if the configuration states it."""
    capacity: Annotated[Annotated[int, Field(ge=0, le=MAX_SIZE)] | None, ByCore.FIELD] = None
    """Bytes that the guest sees."""
    file_size: Annotated[Annotated[int, Field(ge=0)] | None, ByCore.FIELD] = None
    """Bytes of the file, for packages that list them."""
    image_uuid: Annotated[UUID | None, ByCore.FIELD] = None
    """The identity that the image itself holds, for platforms that compare the two."""
    layers: Annotated[tuple[Layer, ...], Field(max_length=MAX_LAYERS)] = ()
    """The layers below `file`, the nearest first, for platforms that list them."""
    device: Word | None = None
    """A physical disk or another machine's LUN, as the source names it. vmconv never opens it."""
    mode: Literal["persistent", "independent-persistent", "independent-nonpersistent"] | None = None
    shared: bool | None = None
    discard: bool | None = None
    serial: Word | None = None


class Removable(_Attached):
    """A drive with removable medium; `file` is the image in it, `device` the host's drive."""

    kind: Literal["cdrom", "floppy"]
    file: Word | None = None
    device: Word | None = None
    connected: bool | None = None


class Nic(_Part):
    """A network card. `network` is the name of what it is connected to, on the source's host."""

    mac: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")] | None = None
    """Six octets, lower case, separated by colons."""
    mac_origin: Annotated[Literal["static", "generated"] | None, About("mac")] = None
    model: Word | None = None
    """One of `NIC_MODELS`, or the source's own word for any other."""
    network: Word | None = None
    network_kind: Literal["bridged", "nat", "host-only", "internal", "none"] | None = None
    connected: bool | None = None
    pci_slot: Word | None = None
    boot_index: Index | None = None


class Display(_Part):
    """The graphics card; `memory` is in bytes."""

    model: Word | None = None
    memory: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    heads: Annotated[int, Field(ge=0, le=64)] | None = None


class Serial(_Part):
    """A serial port; `target` is what the host connects to it, in the terms of the source."""

    index: Index = 0
    kind: Literal["file", "pipe", "network", "pty", "device", "none"] | None = None
    target: Word | None = None


class Property(_Part):
    """A product property of an OVF package that is passed to the guest."""

    key: Word
    value: Text | None = None
    label: Text | None = None


class Machine(_Part):
    """A virtual machine without the content of its disks."""

    name: Word | None = None
    description: Text | None = None
    os: GuestOS = GuestOS()
    cpu: Cpu = Cpu()
    memory: Memory = Memory()
    firmware: Firmware = Firmware()
    tpm: Tpm | None = None
    identity: Identity = Identity()
    board: Board = Board()
    controllers: Annotated[tuple[Controller, ...], Field(max_length=MAX_DEVICES)] = ()
    disks: Annotated[tuple[Disk, ...], Field(max_length=MAX_DEVICES)] = ()
    removables: Annotated[tuple[Removable, ...], Field(max_length=MAX_DEVICES)] = ()
    nics: Annotated[tuple[Nic, ...], Field(max_length=MAX_DEVICES)] = ()
    display: Display | None = None
    sound: Word | None = None
    """The model of the sound card."""
    serials: Annotated[tuple[Serial, ...], Field(max_length=MAX_DEVICES)] = ()
    usb: Literal["uhci", "ehci", "xhci"] | None = None
    """The fastest USB controller."""
    watchdog: Word | None = None
    rng: bool | None = None
    passthrough: tuple[Word, ...] = ()
    """Host devices given to the guest, as the source names them."""
    memory_state: Word | None = None
    """The file with the memory of a suspended machine."""
    snapshots: tuple[Word, ...] = ()
    """Names of the machine's snapshots; conversions take the current state."""
    properties: tuple[Property, ...] = ()
    extra: dict[str, dict[str, Text]] = {}
    """Settings without a neutral meaning, by the name of their format and their own key."""

    def controller_model(self, bus: str | None, index: int | None) -> str | None:
        """Returns the model of a controller, by default of the first one of the bus; None if it is not stated."""
        place = (bus, index or 0)
        return next((one.model for one in self.controllers if (one.bus, one.index) == place), None)
