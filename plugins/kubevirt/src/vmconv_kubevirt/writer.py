"""Writes a VirtualMachine, and a DataVolume for each disk: the disks are uploaded into them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from vmconv.plugin import ConfigFile
from vmconv_kubevirt.words import ARCHITECTURES, DESCRIPTION, DEVICE, FILE, FORMAT, NICS, OS, SOUNDS, label

if TYPE_CHECKING:
    from vmconv.machine import Disk, Machine, Nic
    from vmconv_kubevirt.options import Options

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_/-]*(\.[A-Za-z][A-Za-z0-9_/-]*)*")
_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "inf", "nan")
_REFERENCES = {"persistentVolumeClaim": "claimName", "dataVolume": "name", "containerDisk": "image"}


_Safe: Any = yaml.SafeDumper


class _Dumper(_Safe):  # type: ignore[misc]  # yaml has no types
    """Quotes each text that some version of YAML reads as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Any, text: str) -> Any:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def write(machine: Machine, options: Options) -> tuple[ConfigFile, ...]:
    """Returns one file: the VirtualMachine, then its DataVolumes."""
    objects = [virtual_machine(machine), *_data_volumes(machine, options)]
    text = yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000, explicit_start=len(objects) > 1
    )
    return (ConfigFile("", text.encode()),)


def virtual_machine(machine: Machine) -> dict[str, Any]:
    """Returns the VirtualMachine object."""
    spec = {
        "architecture": ARCHITECTURES[machine.os.architecture or "x86_64"],
        "domain": _domain(machine),
        "networks": [_network(nic, at) for at, nic in enumerate(machine.nics)],
        "volumes": [_volume(machine, disk, at) for at, disk in enumerate(machine.disks)],
    }
    root: dict[str, Any] = {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": _stated({"name": machine.name, "annotations": _notes(machine) or None}),
        "spec": {"template": {"spec": _stated(spec)}},
    }
    kept = machine.extra.get("kubevirt", {})
    for path, text in kept.items():
        _put(root, path, json.loads(text))
    if "spec.running" not in kept:
        root["spec"].setdefault("runStrategy", "Halted")
    return root


def _stated(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, [])}


def _put(root: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        root = root.setdefault(name, {})
    if isinstance(value, dict) and isinstance(root.get(last), dict):
        value = {**root[last], **value}
    root[last] = value


def _notes(machine: Machine) -> dict[str, str]:
    notes = _stated({DESCRIPTION: machine.description, OS: machine.os.id})
    for at, disk in enumerate(machine.disks):
        if disk.file is None and disk.device is not None and not _reference(disk.device):
            notes[f"{DEVICE}{_name(at)}"] = disk.device
    return notes


def _domain(machine: Machine) -> dict[str, Any]:
    cpu, identity, firmware = machine.cpu, machine.identity, machine.firmware
    loader: dict[str, Any] = {"bios": {}}
    features: dict[str, Any] = {"acpi": {}}
    if firmware.kind == "uefi":
        loader = {"efi": {"secureBoot": bool(firmware.secure_boot)}}
    if firmware.secure_boot:
        features["smm"] = {"enabled": True}
    values: dict[str, Any] = {
        "chassis": _stated({"serial": identity.chassis_serial, "asset": identity.asset_tag}) or None,
        "clock": {"utc": {}} if machine.board.clock == "utc" else None,
        "cpu": _stated({"sockets": cpu.sockets, "cores": cpu.cores, "threads": cpu.threads, "model": cpu.model}),
        "devices": _devices(machine),
        "features": features,
        "firmware": _stated(
            {
                "bootloader": loader,
                "serial": identity.serial,
                "uuid": None if identity.uuid is None else str(identity.uuid),
            }
        ),
        "machine": {"type": machine.board.chipset or "q35"},
        "memory": {"guest": _quantity(machine.memory.size or 0)},
    }
    return _stated(values)


def _quantity(size: int) -> str:
    """Returns bytes as a quantity of Kubernetes, with the largest exact suffix."""
    for power, suffix in ((40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")):
        if size and size % (1 << power) == 0:
            return f"{size >> power}{suffix}"
    return str(size)


def _devices(machine: Machine) -> dict[str, Any]:
    values: dict[str, Any] = {
        "disks": [_disk(disk, at) for at, disk in enumerate(machine.disks)],
        "interfaces": [_interface(nic, at) for at, nic in enumerate(machine.nics)],
        "rng": {} if machine.rng else None,
        "sound": {"name": "sound", "model": SOUNDS[machine.sound]} if machine.sound else None,
        # Without persistence the guest's secrets end with each stop.
        "tpm": {"persistent": True} if machine.tpm else None,
        "watchdog": {"name": "watchdog", "i6300esb": {}} if machine.watchdog else None,
    }
    if not machine.nics:
        # KubeVirt would add one.
        values["autoattachPodInterface"] = False
    return _stated(values)


def _name(at: int) -> str:
    return f"disk-{at + 1}"


def _disk(disk: Disk, at: int) -> dict[str, Any]:
    order = None if disk.boot_index is None else disk.boot_index + 1
    values = {"name": _name(at), "disk": {"bus": disk.bus}, "bootOrder": order, "serial": disk.serial}
    return _stated({**values, "shareable": disk.shared})


def _reference(device: str) -> dict[str, Any] | None:
    """Returns the source of a volume that the reader named, such as `persistentVolumeClaim:data`."""
    kind, _, name = device.partition(":")
    if kind not in _REFERENCES or not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*", name):
        return None
    return {kind: {_REFERENCES[kind]: name}}


def _volume(machine: Machine, disk: Disk, at: int) -> dict[str, Any]:
    if disk.file is not None:
        return {"name": _name(at), "dataVolume": {"name": _volume_name(machine, at)}}
    if disk.device is None:
        return {"name": _name(at), "emptyDisk": {"capacity": _quantity(disk.capacity or 0)}}
    claim = {"persistentVolumeClaim": {"claimName": label(disk.device) or _name(at)}}
    return {"name": _name(at), **(_reference(disk.device) or claim)}


def _volume_name(machine: Machine, at: int) -> str:
    return f"{machine.name}-{_name(at)}"


def _data_volumes(machine: Machine, options: Options) -> list[dict[str, Any]]:
    """Returns a DataVolume for each file. containerized-data-importer, "upload"."""
    return [
        {
            "apiVersion": "cdi.kubevirt.io/v1beta1",
            "kind": "DataVolume",
            "metadata": _stated(
                {
                    "name": _volume_name(machine, at),
                    "namespace": json.loads(machine.extra.get("kubevirt", {}).get("metadata.namespace", "null")),
                    "annotations": _stated({FILE: disk.file, FORMAT: disk.format}),
                }
            ),
            "spec": {
                "source": {"upload": {}},
                "storage": _stated(
                    {
                        "resources": {"requests": {"storage": _quantity(disk.capacity or 0)}},
                        "storageClassName": options.storage_class,
                    }
                ),
            },
        }
        for at, disk in enumerate(machine.disks)
        if disk.file is not None
    ]


def _interface(nic: Nic, at: int) -> dict[str, Any]:
    order = None if nic.boot_index is None else nic.boot_index + 1
    state = None if nic.connected is None else "up" if nic.connected else "down"
    values = {"name": f"nic-{at + 1}", ("masquerade" if nic.network is None else "bridge"): {}}
    return _stated(
        {**values, "model": NICS[nic.model or "e1000e"], "macAddress": nic.mac, "bootOrder": order, "state": state}
    )


def _network(nic: Nic, at: int) -> dict[str, Any]:
    source = {"pod": {}} if nic.network is None else {"multus": {"networkName": nic.network}}
    return {"name": f"nic-{at + 1}", **source}
