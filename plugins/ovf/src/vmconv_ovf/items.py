"""Items of a VirtualHardwareSection, of all versions of OVF, as flat values."""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.etree.ElementTree import Element

from vmconv.machine import quoted
from vmconv_ovf.envelope import Envelope, configs

MAX_ITEMS = 4096

# Arrays in CIM; VMware and VirtualBox use one value.
_SINGLE = frozenset(
    {
        *("InstanceID", "ResourceType", "ResourceSubType", "Parent", "AddressOnParent", "Address", "BusNumber"),
        *("AllocationUnits", "VirtualQuantity", "AutomaticAllocation", "HostResource", "Connection"),
        *("CoresPerSocket", "ElementName", "Caption", "Reservation"),
    }
)


class Item(NamedTuple):
    """One virtual device; `values` are the texts of its CIM properties, `settings` those of VMware."""

    where: str
    id: str
    type: int
    required: bool
    values: dict[str, str]
    settings: dict[str, str]

    def get(self, name: str) -> str | None:
        return self.values.get(name)

    @property
    def subtypes(self) -> list[str]:
        """The acceptable subtypes in the order of preference, in lower case (DSP0243, 8.1)."""
        return re.split(r"[\s,]+", self.values.get("ResourceSubType", "").lower().strip())


def items_of(envelope: Envelope, section: Element) -> list[Item]:
    """Returns the items of the deployed configuration, without the bounds of ranges.

    An item of the configuration replaces one for all configurations with the same id (DSP0243, 9.8).
    """
    found: dict[str, tuple[bool, Item]] = {}
    elements = list(envelope.all(section, "Item", "StorageItem", "EthernetPortItem"))
    if len(elements) > MAX_ITEMS:
        raise envelope.refused("VirtualHardwareSection", f"has {len(elements)} items, the limit is {MAX_ITEMS}")
    for element in elements:
        if (envelope.get(element, "bound") or "normal").lower() != "normal":
            continue
        item = _item(envelope, element)
        special = envelope.get(element, "configuration") is not None
        if item.id in found and found[item.id][0] == special:
            raise envelope.refused(item.where, "two items have this InstanceID")
        if item.id not in found or special:
            found[item.id] = special, item
    return [item for _, item in found.values()]


def _item(envelope: Envelope, element: Element) -> Item:
    values: dict[str, str] = {}
    for child in element:
        name = child.tag.rpartition("}")[2]
        # OVF 0.9 spells it so.
        name = "InstanceID" if name == "InstanceId" else name
        if name in _SINGLE:
            text = envelope.text(child)
            if values.setdefault(name, text) != text:
                where = f"Item {values.get('InstanceID', '')}".rstrip()
                raise envelope.refused(where, f"{name} is {quoted(values[name])} and {quoted(text)}")
    values = {name: text for name, text in values.items() if text}
    key = values.get("InstanceID", "")
    label = values.get("ElementName") or values.get("Caption") or values.get("ResourceSubType") or ""
    where = f"Item {quoted(key)} {quoted(label)}" if label else f"Item {quoted(key)}"
    if not key:
        raise envelope.refused(where, "has no InstanceID")
    if "ResourceType" not in values:
        raise envelope.refused(where, "has no ResourceType")
    kind = envelope.number(f"{where} ResourceType", values["ResourceType"], 1 << 16)
    return Item(where, key, kind, envelope.required(element), values, dict(configs(element)))
