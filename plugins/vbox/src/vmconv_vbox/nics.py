"""Reads network cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmconv.machine import Nic, mac_address, part
from vmconv_vbox.structs import NIC_NAMES, NICS, NS

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from vmconv_vbox.settings import Settings

_MODES = {
    "NAT": ("nat", None),
    "NATNetwork": ("nat", "name"),
    "BridgedInterface": ("bridged", "name"),
    "InternalNetwork": ("internal", "name"),
    "HostOnlyInterface": ("host-only", "name"),
    "HostOnlyNetwork": ("host-only", "name"),
    "GenericInterface": (None, "driver"),
    "CloudNetwork": (None, "name"),
}


def nics(settings: Settings) -> tuple[Nic, ...]:
    """Returns the cards that are enabled; the others do not exist for the guest."""
    found = []
    for network in settings.all("Network"):
        for adapter in list(network):
            if adapter.tag == f"{NS}Adapter" and adapter.get("enabled") == "true":
                found.append(_nic(settings, adapter))
            elif adapter.tag == f"{NS}Adapter":
                network.remove(adapter)
    return tuple(found)


def _nic(settings: Settings, adapter: Element) -> Nic:
    slot = settings.take(adapter, "slot") or "0"
    element = f"Network/Adapter[{slot}]"
    del adapter.attrib["enabled"]
    # Settings of modes that were used before.
    for old in adapter.findall(f"{NS}DisabledModes"):
        adapter.remove(old)
    mac = settings.take(adapter, "MACAddress")
    kind = settings.take(adapter, "type") or "Am79C973"
    model = NICS.get(kind, kind.lower())
    if NIC_NAMES.get(model) != kind:
        adapter.set("type", kind)
    cable = settings.take(adapter, "cable")
    return part(
        settings.file,
        element,
        Nic,
        mac=mac_address(settings.file, f"{element} MACAddress", mac) if mac else None,
        model=model,
        connected=cable is None or settings.boolean(f"{element} cable", cable),
        **_mode(adapter),
    )


def _mode(adapter: Element) -> dict[str, Any]:
    for child in list(adapter):
        kind, attribute = _MODES.get(child.tag.removeprefix(NS), ("", None))
        if kind == "":
            continue
        network = child.get(attribute) if attribute else None
        if child.tag in (f"{NS}NAT", f"{NS}BridgedInterface", f"{NS}InternalNetwork", f"{NS}HostOnlyInterface"):
            child.attrib.pop(attribute or "", None)
        return {"network_kind": kind, "network": network or None}
    return {"network_kind": "none"}
