"""Puts network cards into libvirt's terms: which model, and which network of the host."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmconv_libvirt.words import NICS

if TYPE_CHECKING:
    from vmconv.machine import Changes, Nic
    from vmconv_libvirt.options import Options

_INTERFACE = re.compile(r"[A-Za-z0-9_.\-]{1,15}")
"""Names of network interfaces of Linux."""

_PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


def adapt_nics(nics: tuple[Nic, ...], options: Options, changes: Changes) -> tuple[Nic, ...]:
    """Returns the cards with models that QEMU has, connected to networks that libvirt can express."""
    return tuple(_nic(nic, f"nics[{at}]", options, changes) for at, nic in enumerate(nics))


def _nic(nic: Nic, path: str, options: Options, changes: Changes) -> Nic:
    mac, model, slot = nic.mac, nic.model or "e1000", nic.pci_slot
    if mac and int(mac[:2], 16) & 1:
        mac = changes.set(f"{path}.mac", mac, None, "it is a multicast address, which no card has")
    if model not in NICS:
        after = "e1000e" if model == "hyperv" else "e1000"
        model = changes.set(f"{path}.model", nic.model, after, "QEMU has no such network card")
    if slot and not _PCI.fullmatch(slot):
        slot = changes.set(f"{path}.pci_slot", slot, None, "libvirt counts PCI slots in its own way")
    kind, network, reason = _network(nic, options)
    connected = nic.connected
    if nic.network_kind == "none":
        connected = changes.set(f"{path}.connected", connected, False, reason)
    values = {
        "connected": connected,
        "network_kind": changes.set(f"{path}.network_kind", nic.network_kind, kind, reason),
        "network": changes.set(f"{path}.network", nic.network, network, reason),
    }
    return nic.model_copy(update={"mac": mac, "model": model, "pci_slot": slot, **values})


def _network(nic: Nic, options: Options) -> tuple[str | None, str | None, str]:
    """Returns kind and name of the network, and the reason for a change."""
    kind, name = nic.network_kind, nic.network
    if options.network is not None:
        return None, options.network, "asked for with network="
    if options.bridge is not None:
        return "bridged", options.bridge, "asked for with bridge="
    if kind == "none":
        # libvirt 9.0 crashes on interfaces of type null.
        return "nat", None, "the card's link is down instead"
    if kind == "bridged" and name and _INTERFACE.fullmatch(name):
        return "bridged", name, ""
    if kind == "nat" and name is None:
        return "nat", None, ""
    if kind in ("host-only", "internal") and name is None:
        return None, kind, "the libvirt network of this name has to be isolated"
    if kind == "bridged":
        why = "the source names no bridge of a Linux host; the libvirt network has to be a bridge"
        return None, name or "default", why
    return None, name or "default", "the definition of the libvirt network decides this"
