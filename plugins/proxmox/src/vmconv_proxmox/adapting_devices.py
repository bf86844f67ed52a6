"""Puts network cards and devices other than drives into Proxmox's terms."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from vmconv.machine import Display, Machine, Nic, Serial
from vmconv_proxmox.devices import NIC_NAMES, NICS

if TYPE_CHECKING:
    from vmconv.machine import Changes
    from vmconv_proxmox.options import Options

MAX_NICS = 32
_OUI = "bc:24:11"
"""Proxmox's own prefix of MAC addresses."""
_BRIDGE = re.compile(r"[A-Za-z0-9._-]{1,15}")
_DISPLAYS = frozenset(
    {"cirrus", "none", "qxl", "vga", "virtio", "virtio-gl", "vmware", *(f"serial{number}" for number in range(4))}
)
_WATCHDOGS = ("i6300esb", "ib700")
_SOUNDS = ("ac97", "hda")


def adapt_nics(machine: Machine, windows: bool, options: Options, changes: Changes) -> tuple[Nic, ...]:
    """Returns the cards with a model, an address and a bridge that exist on Proxmox."""
    for number in range(MAX_NICS, len(machine.nics)):
        changes.add(f"nics[{number}]", "network card", None, f"Proxmox has {MAX_NICS} network cards")
    return tuple(_nic(machine, number, windows, options, changes) for number in range(len(machine.nics))[:MAX_NICS])


def _nic(machine: Machine, number: int, windows: bool, options: Options, changes: Changes) -> Nic:
    nic, path = machine.nics[number], f"nics[{number}]"
    known = {NIC_NAMES.get(model, model) for model in NICS}
    model = nic.model if nic.model in known else ("e1000" if windows or nic.model == "vmxnet2" else "virtio")
    changes.set(f"{path}.model", nic.model, model, "Proxmox has no such card")
    kind = "nat" if nic.network_kind == "nat" else "bridged"
    changes.set(f"{path}.network_kind", nic.network_kind, kind, "Proxmox connects cards to bridges")
    network = None if kind == "nat" else _bridge(machine, nic.network, options)
    changes.set(f"{path}.network", nic.network, network, "is no bridge of the target; another one: -o bridge=NAME")
    connected = nic.connected is not False and nic.network_kind != "none"
    changes.set(f"{path}.connected", nic.connected, connected, "the card is connected to nothing")
    values = {"model": model, "network_kind": kind, "network": network, "connected": connected}
    return nic.model_copy(update={**values, "mac": _mac(machine, number, options, changes)})


def _bridge(machine: Machine, network: str | None, options: Options) -> str:
    """Returns the machine's own bridge if its name tells that it is one."""
    if network and re.fullmatch(r"vmbr\d{1,4}", network):
        return network
    own = machine.board.chipset and "proxmox" in machine.extra
    return network if own and network and _BRIDGE.fullmatch(network) else options.bridge


def _mac(machine: Machine, number: int, options: Options, changes: Changes) -> str:
    """Returns the card's address. Without one in the configuration, Proxmox would make up a new one at each start."""
    mac = machine.nics[number].mac
    if mac is not None and int(mac[:2], 16) % 2 == 0:
        return mac
    seed = f"{machine.identity.uuid or machine.name}/{options.vmid}/{number}"
    made = f"{_OUI}:{hashlib.sha256(seed.encode()).digest()[:3].hex(':')}"
    return changes.set(f"nics[{number}].mac", mac, made, "Proxmox refuses multicast addresses")


def adapt_others(machine: Machine, changes: Changes) -> dict[str, Any]:
    """Returns the display, sound, serial ports, watchdog and random number generator."""
    return {
        "display": _display(machine.display, changes),
        "sound": _known("sound", machine.sound, _SOUNDS, changes),
        "serials": _serials(machine.serials, changes),
        "watchdog": _known("watchdog", machine.watchdog, _WATCHDOGS, changes),
        "rng": changes.set("rng", machine.rng, machine.rng or None, "a machine without the device has none"),
    }


def _known(path: str, value: str | None, known: tuple[str, ...], changes: Changes) -> str | None:
    if value is None or value in known:
        return value
    return changes.set(path, value, None, f"Proxmox has {' and '.join(known)}")


def _display(display: Display | None, changes: Changes) -> Display | None:
    if display is None:
        return None
    model = display.model if display.model in _DISPLAYS else "vga"
    changes.set("display.model", display.model, model, "Proxmox has no such graphics card")
    memory = display.memory
    if memory is not None:
        size = min(max(4, -(-memory >> 20)), 512) << 20
        memory = changes.set("display.memory", memory, size, "Proxmox takes 4 to 512 MiB")
    heads = display.heads if model == "qxl" and display.heads in (2, 3, 4) else None
    changes.set("display.heads", display.heads, heads, "only qxl has several heads, 2 to 4")
    return Display(model=model, memory=memory, heads=heads)


def _serials(serials: tuple[Serial, ...], changes: Changes) -> tuple[Serial, ...]:
    kept = tuple(_serial(one) for one in sorted(serials, key=lambda one: one.index) if one.index < 4)
    if kept != serials:
        before, after = (tuple(_words(one) for one in ports) for ports in (serials, kept))
        changes.add("serials", before, after, "Proxmox has 4 serial ports, each a socket or a device in /dev")
    return kept


def _serial(port: Serial) -> Serial:
    if port.kind == "device" and re.fullmatch(r"/dev/[^,\s]+", port.target or ""):
        return port
    return Serial(index=port.index, kind="pipe")


def _words(port: Serial) -> str:
    return f"serial{port.index} {port.target or port.kind or ''}".strip()
