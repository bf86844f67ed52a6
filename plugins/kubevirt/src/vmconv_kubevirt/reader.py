"""Reads a VirtualMachine and the DataVolumes beside it. kubevirt.io/api/core/v1, "schema.go"."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vmconv.machine import (
    Board,
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
    mac_address,
    part,
    quoted,
    refused,
)
from vmconv_kubevirt.documents import documents
from vmconv_kubevirt.settings import Settings
from vmconv_kubevirt.words import ARCHITECTURES, DESCRIPTION, DEVICE, FILE, FORMAT, KEPT, NICS, OS, SOUNDS

if TYPE_CHECKING:
    from vmconv.plugin import File

_SUFFIXES = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate("kMGTPE", start=1)},
    **{f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", start=1)},
}
_BOUND = 1 << 62
MAX_EXTRA = 1000
_SHOWN = 1 << 14
"""Letters of an unknown field that are kept."""

_RECORDS = (
    *("apiVersion", "kind", "status", "spec.template.metadata.creationTimestamp"),
    *(f"metadata.{name}" for name in ("creationTimestamp", "deletionTimestamp", "generation", "managedFields")),
    *(f"metadata.{name}" for name in ("resourceVersion", "selfLink", "uid", "ownerReferences", "finalizers")),
    "metadata.annotations.kubectl.kubernetes.io/last-applied-configuration",
)
"""What the API server writes of an object; it describes no machine."""

_VOLUMES = ("DataVolume", "PersistentVolumeClaim")


def read(file: File) -> Machine:
    """Returns the machine. Raises `ImageError` with the field for values of another type, and for several machines."""
    found = documents(file)
    machines = [each for each in found if each.get("kind") == "VirtualMachine"]
    if len(machines) != 1:
        raise refused(file, "kind", f"the file has {len(machines)} objects VirtualMachine")
    return _Reader(file, machines[0], found).machine()


class _Reader(Settings):
    def __init__(self, file: File, root: dict[str, Any], documents: list[dict[str, Any]]) -> None:
        super().__init__(file)
        self.root, self.documents = root, documents
        self.spec = self.get(root, "spec.template.spec", dict) or {}
        self.domain = self.get(self.spec, "domain", dict) or {}
        self.devices = self.get(self.domain, "devices", dict) or {}
        self.volumes = {
            name: self._volume(each)
            for each in (*documents, *self.list(root, "spec.dataVolumeTemplates"))
            if each is not root and "spec" in each and isinstance(name := self.get(each, "metadata.name", str), str)
        }

    def quantity(self, values: Any, path: str) -> int | None:
        """Returns bytes. Kubernetes, "Quantity": a number with a suffix or an exponent."""
        text = self.get(values, path, (int, str))
        if text is None:
            return None
        found = re.fullmatch(r"(\d{1,19}(?:\.\d{1,19})?)(?:e(\d{1,2})|([kMGTPE]|[KMGTPE]i|))", str(text))
        size = found and Decimal(found[1]) * (10 ** int(found[2]) if found[2] else _SUFFIXES[found[3] or ""])
        if not size or size > _BOUND or size != int(size):
            raise refused(self.file, path, f"{quoted(text)} is not a number of bytes")
        return int(size)

    def number(self, values: Any, path: str) -> int | None:
        found: int | None = self.get(values, path, int)
        return found

    def machine(self) -> Machine:
        notes = self.get(self.root, "metadata.annotations", dict) or {}
        disks, removables = self._disks()
        devices = self.devices
        # Without persistence the TPM is new at each start, and no other platform has that.
        self.get(devices, "tpm.persistent", bool)
        for name in ("sound", "watchdog"):
            self.get(devices, f"{name}.name", str)
        sound = self.get(devices, "sound.model", str) if "sound" in devices else None
        found = part(
            self.file,
            "VirtualMachine",
            Machine,
            name=self.get(self.root, "metadata.name", str),
            description=self.entry(notes, DESCRIPTION, str),
            os=self._guest(notes),
            cpu=self._cpu(),
            memory=self._memory(),
            firmware=self._firmware(),
            tpm=Tpm(version="2.0") if self.get(devices, "tpm", dict) is not None else None,
            identity=self._identity(),
            board=self._board(),
            disks=disks,
            removables=removables,
            nics=self._nics(),
            sound={theirs: ours for ours, theirs in SOUNDS.items()}.get(sound or "", sound)
            or ("hda" if "sound" in devices else None),
            watchdog="i6300esb" if self.get(devices, "watchdog.i6300esb", dict) is not None else None,
            rng=self.get(devices, "rng", dict) is not None or None,
            passthrough=tuple(
                str(self.get(each, "deviceName", str) or self.get(each, "name", str) or "")
                for name in ("hostDevices", "gpus")
                for each in self.list(devices, name)
            ),
        )
        # Last, when everything else has been read.
        kept = {**self._kept(), **self._rest()}
        if len(kept) > MAX_EXTRA:
            raise refused(self.file, "VirtualMachine", f"more than {MAX_EXTRA} fields are not known")
        return part(
            self.file, "VirtualMachine", Machine, **{**dict(found), "extra": {"kubevirt": kept} if kept else {}}
        )

    def _guest(self, notes: dict[str, Any]) -> GuestOS:
        words = {theirs: ours for ours, theirs in ARCHITECTURES.items()}
        architecture = self.get(self.spec, "architecture", str)
        if architecture is not None and architecture not in words:
            raise refused(self.file, "architecture", f"{quoted(architecture)} is not amd64 or arm64")
        system = self.entry(notes, OS, str)
        return part(self.file, OS, GuestOS, id=system, architecture=words.get(architecture or ""))

    def _cpu(self) -> Cpu:
        cpu = self.get(self.domain, "cpu", dict) or {}
        found = {name: self.number(cpu, name) for name in ("sockets", "cores", "threads")}
        if any(value is not None for value in found.values()):
            # Counts that are not stated are 1.
            found = {name: 1 if value is None else value for name, value in found.items()}
            found["count"] = (found["sockets"] or 0) * (found["cores"] or 0) * (found["threads"] or 0)
        return part(self.file, "cpu", Cpu, **found, model=self.get(cpu, "model", str))

    def _memory(self) -> Memory:
        asked = self.quantity(self.domain, "resources.requests.memory")
        size = self.quantity(self.domain, "memory.guest") or asked
        return part(self.file, "memory", Memory, size=size, max=self.quantity(self.domain, "memory.maxGuest"))

    def _firmware(self) -> Firmware:
        loader = self.get(self.domain, "firmware.bootloader", dict) or {}
        if self.get(loader, "efi", dict) is not None:
            secure = self.get(loader, "efi.secureBoot", bool)
            # KubeVirt's default is on.
            return Firmware(kind="uefi", secure_boot=secure is not False)
        return Firmware(kind="bios" if self.get(loader, "bios", dict) is not None else None)

    def _identity(self) -> Identity:
        text = self.get(self.domain, "firmware.uuid", str)
        if text and not re.fullmatch(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}", text):
            raise refused(self.file, "firmware.uuid", f"{quoted(text)} is not a UUID")
        return part(
            self.file,
            "firmware",
            Identity,
            uuid=UUID(text) if text else None,
            serial=self.get(self.domain, "firmware.serial", str),
            chassis_serial=self.get(self.domain, "chassis.serial", str),
            asset_tag=self.get(self.domain, "chassis.asset", str),
        )

    def _board(self) -> Board:
        kind = self.get(self.domain, "machine.type", str) or ""
        chipset = "q35" if "q35" in kind else "virt" if kind.startswith("virt") else None
        clock = "utc" if self.get(self.domain, "clock.utc", dict) is not None else None
        return part(self.file, "machine", Board, chipset=chipset, clock=clock)

    def _volume(self, document: dict[str, Any]) -> dict[str, Any]:
        """Returns what a DataVolume or a claim says of its disk."""
        notes = self.get(document, "metadata.annotations", dict) or {}
        path = "spec.storage.resources.requests.storage"
        if self.get(document, "spec.storage", dict) is None:
            path = "spec.pvc.resources.requests.storage"
        if document.get("kind") == "PersistentVolumeClaim":
            path = "spec.resources.requests.storage"
        size = self.quantity(document, path)
        if self.entry(notes, FILE, str):
            # The writer's: the user uploads the disk, and an option names the class.
            self.get(document, "spec.source.upload", dict)
            self.get(document, "spec.storage.storageClassName", str)
        return {"file": self.entry(notes, FILE, str), "format": self.entry(notes, FORMAT, str), "capacity": size}

    def _disks(self) -> tuple[tuple[Disk, ...], tuple[Removable, ...]]:
        volumes = {each.get("name"): each for each in self.list(self.spec, "volumes") if _has_name(each)}
        disks, removables = [], []
        for at, each in enumerate(self.list(self.devices, "disks")):
            where = f"disks[{at}]"
            source = self._source(volumes.get(self.get(each, "name", str)), where)
            order = self._order(each, where)
            if self.get(each, "cdrom", dict) is not None:
                bus = self.get(each, "cdrom.bus", str)
                values = {name: source[name] for name in ("file", "device")}
                removables.append(part(self.file, where, Removable, kind="cdrom", bus=bus, boot_index=order, **values))
                continue
            if source["file"] is None and source["device"] is None and source["capacity"] is None:
                raise refused(self.file, where, f"volume {quoted(each.get('name'))} is not there")
            bus = self.get(each, "lun.bus", str) or self.get(each, "disk.bus", str)
            disks.append(
                part(
                    self.file,
                    where,
                    Disk,
                    **source,
                    bus=bus,
                    boot_index=order,
                    shared=self.get(each, "shareable", bool),
                    serial=self.get(each, "serial", str),
                )
            )
        return tuple(disks), tuple(removables)

    def _order(self, device: dict[str, Any], where: str) -> int | None:
        order = self.number(device, "bootOrder")
        if order is not None and order < 1:
            raise refused(self.file, f"{where}.bootOrder", f"{order} is not a number from 1")
        return None if order is None else order - 1

    def _source(self, volume: dict[str, Any] | None, where: str) -> dict[str, Any]:
        """Returns the file of a volume, if a DataVolume beside the machine names it, or the name of another source."""
        found: dict[str, Any] = {"file": None, "device": None, "format": None, "capacity": None}
        if volume is None:
            return found
        self.get(volume, "name", str)
        kind = next((name for name in volume if name != "name"), "")
        if kind == "emptyDisk":
            return found | {"capacity": self.quantity(volume, "emptyDisk.capacity")}
        keys = ("name", "claimName", "image", "path", "secretName")
        value: dict[str, Any] = (self.get(volume, kind, dict) if kind else None) or {}
        name = next((self.get(value, key, str) for key in keys if isinstance(value.get(key), str)), "")
        known = self.volumes.get(name) if kind in ("dataVolume", "persistentVolumeClaim") else None
        if known is not None and known["file"] is not None:
            return found | known
        notes = self.get(self.root, "metadata.annotations", dict) or {}
        device = self.entry(notes, f"{DEVICE}{volume.get('name')}", str) or f"{kind}:{name}"
        return found | {"device": device, "capacity": known["capacity"] if known else None}

    def _nics(self) -> tuple[Nic, ...]:
        networks = {each.get("name"): each for each in self.list(self.spec, "networks") if _has_name(each)}
        found = tuple(
            self._nic(each, networks.get(self.get(each, "name", str)) or {}, f"interfaces[{at}]")
            for at, each in enumerate(self.list(self.devices, "interfaces"))
        )
        if not found and self.get(self.devices, "autoattachPodInterface", bool) is not False:
            # KubeVirt adds a card in the pod's network then.
            return (Nic(model="virtio", network_kind="nat"),)
        return found

    def _nic(self, card: dict[str, Any], network: dict[str, Any], where: str) -> Nic:
        mac, model = self.get(card, "macAddress", str), self.get(card, "model", str)
        state = self.get(card, "state", str)
        name = self.get(network, "multus.networkName", str)
        self.get(network, "name", str)
        self.get(network, "pod", dict)
        nat, bridge = (self.get(card, binding, dict) is not None for binding in ("masquerade", "bridge"))
        kind = "nat" if nat else "bridged" if bridge else None
        return part(
            self.file,
            where,
            Nic,
            mac=mac_address(self.file, f"{where}.macAddress", mac) if mac else None,
            model={theirs: ours for ours, theirs in NICS.items()}.get(model or "", model),
            network=name,
            network_kind=kind,
            connected={"up": True, "down": False}.get(state or ""),
            boot_index=self._order(card, where),
        )

    def _kept(self) -> dict[str, str]:
        found = {}
        for path in KEPT:
            value = self.get(self.root, path, object)
            if path.endswith(".features") and isinstance(value, dict):
                # ACPI is the default, and SMM follows from Secure Boot.
                value = {name: each for name, each in value.items() if name != "smm" and (name, each) != ("acpi", {})}
            if value not in (None, {}) and (path, value) != ("spec.runStrategy", "Halted"):
                found[path] = json.dumps(value, sort_keys=True)
        return found

    def _rest(self) -> dict[str, str]:
        """Returns the fields that nobody has read, as JSON, and the objects beside the machine."""
        found = {path: _json(value) for path, value in self.unread(self.root, "", {*KEPT, *_RECORDS})}
        for each in self.documents:
            if each is self.root:
                continue
            title = f"{each.get('kind')} {self.get(each, 'metadata.name', str)}"
            if title.partition(" ")[0] not in _VOLUMES:
                found[title] = "an object beside the machine"
            found |= {
                f"{title}: {path}": _json(value)
                for path, value in self.unread(each, "", {*_RECORDS, "metadata.namespace"})
                if title not in found
            }
        return found


def _has_name(value: dict[str, Any]) -> bool:
    return isinstance(value.get("name"), str)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)[:_SHOWN]
