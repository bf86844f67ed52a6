"""What the reader knows of a descriptor: attributes by the path of their element, see `vmconv.machine.unknown`.

Everything else is kept by its path and named as lost: the writer takes none of it over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv.machine import unknown
from vmconv_ovf.keys import PRODUCT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from xml.etree.ElementTree import Element

_FOR_PEOPLE = "*"
"""Titles and descriptions of what another element states."""

_READ = "*"
_SECTION = "required configuration"
_SYSTEM = "Envelope/VirtualSystem"
_HARDWARE = f"{_SYSTEM}/VirtualHardwareSection"
_PRODUCT = f"{_SYSTEM}/ProductSection"

_ITEM = {
    **dict.fromkeys(("ElementName", "Caption", "Description", "InstanceId", "VirtualQuantityUnits"), _FOR_PEOPLE),
    **dict.fromkeys(("InstanceID", "ResourceType", "ResourceSubType", "Parent", "AddressOnParent", "Address"), _READ),
    **dict.fromkeys(("BusNumber", "AllocationUnits", "VirtualQuantity", "AutomaticAllocation", "HostResource"), _READ),
    **dict.fromkeys(("Connection", "CoresPerSocket", "Reservation", "Config"), _READ),
}

_KNOWN = {
    "Envelope": "lang version schemaLocation buildId",
    # Texts are taken by their ids; of the configurations one is deployed, and named.
    **{f"Envelope/{name}": _READ for name in ("Strings", "NetworkSection", "DeploymentOptionSection", "EulaSection")},
    # A system in a collection has sections at both places.
    "Envelope/VirtualSystemCollection": _READ,
    "Envelope/References": "",
    "Envelope/References/File": "href id size chunkSize compression",
    "Envelope/DiskSection": _SECTION,
    "Envelope/DiskSection/Info": _FOR_PEOPLE,
    "Envelope/DiskSection/Disk": "capacity capacityAllocationUnits diskId fileRef format populatedSize uuid",
    _SYSTEM: "id",
    **{f"{_SYSTEM}/{name}": _READ for name in ("Info", "Name", "EulaSection", "BootOrderSection", "Machine")},
    f"{_SYSTEM}/AnnotationSection": _SECTION,
    **{f"{_SYSTEM}/AnnotationSection/{name}": _READ for name in ("Info", "Annotation")},
    f"{_SYSTEM}/OperatingSystemSection": f"{_SECTION} id version osType",
    **{f"{_SYSTEM}/OperatingSystemSection/{name}": _READ for name in ("Info", "Description", "OSType")},
    _PRODUCT: f"{_SECTION} class instance",
    **{f"{_PRODUCT}/{name}": _READ for name in ("Info", "Category", *PRODUCT)},
    f"{_PRODUCT}/Property": f"{_SECTION} key type qualifiers userConfigurable password value",
    **{f"{_PRODUCT}/Property/{name}": _READ for name in ("Label", "Description", "Value")},
    _HARDWARE: f"{_SECTION} transport",
    f"{_HARDWARE}/Info": _FOR_PEOPLE,
    # The source's names for the machine, beside its hardware version.
    f"{_HARDWARE}/System": _READ,
    **{f"{_HARDWARE}/{name}": f"{_SECTION} key value" for name in ("Config", "ExtraConfig")},
    **{
        f"{_HARDWARE}/{item}{child and '/'}{child}": attributes
        for item in ("Item", "StorageItem", "EthernetPortItem")
        for child, attributes in {"": f"{_SECTION} bound", **_ITEM}.items()
    },
}

UNKNOWN = "/"
"""What keys of unknown settings begin with."""


def unknown_settings(root: Element) -> Iterator[tuple[str, str]]:
    """Yields what the reader does not know of a descriptor of OVF 1 or 2; OVF 0.9 names its sections otherwise."""
    yield from ((f"{UNKNOWN}{path}", value) for path, value in unknown(root, "Envelope", _KNOWN))
