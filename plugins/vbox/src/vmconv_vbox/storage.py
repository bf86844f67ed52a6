"""Reads storage controllers, the drives at them, and the media in those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from vmconv.machine import Controller, Disk, Layer, Removable, part, quoted, refused, unknown
from vmconv_vbox.settings import children
from vmconv_vbox.structs import FORMATS, MODES, NS, TYPES, controllers, registered, serial_key

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from vmconv_vbox.settings import Settings


_KNOWN = {
    "AttachedDevice": "type port device discard hotpluggable=false passthrough=false",
    "AttachedDevice/Image": "uuid",
    "AttachedDevice/HostDrive": "src",
}
_KNOWN_DISK = {"HardDisk": "uuid location format type", "HardDisk/HardDisk": "*"}


class Storage(NamedTuple):
    controllers: tuple[Controller, ...]
    disks: tuple[Disk, ...]
    removables: tuple[Removable, ...]


class _Medium(NamedTuple):
    """An image in the registry; the place of the oldest ancestor, and that ancestor's type."""

    location: str
    format: str | None
    type: str
    place: int
    layers: tuple[Layer, ...] = ()
    """The ancestors, the nearest first."""


def read_storage(settings: Settings) -> Storage:
    """Returns the drives. Disks are in the order of the registry, in which they were made."""
    media = dict(_registry(settings))
    types: list[str] = []
    disks: list[tuple[int, Disk]] = []
    removables: list[tuple[int, int, Removable]] = []
    # Before 1.20 and since 1.9, the element is in Hardware; before that it was beside it.
    for element in [*settings.all("StorageControllers/StorageController"), *_old(settings)]:
        name = settings.take(element, "type") or ""
        if name not in TYPES:
            raise refused(settings.file, "StorageController type", f"{quoted(name)} is not known")
        index = sum(TYPES[each].bus == TYPES[name].bus for each in types)
        types.append(name)
        for device in children(element, "AttachedDevice"):
            at = _place(settings, device, name, index)
            if device.get("type") == "HardDisk":
                disks.append(_disk(settings, device, name, at, media))
            else:
                drive = _removable(settings, device, at, media)
                removables.append((len(types), drive.controller or 0, drive))
            place = f"{at['bus']}{at['controller']}:{at['unit']}"
            for key, value in unknown(device, "AttachedDevice", _KNOWN):
                settings.keep(key.replace("AttachedDevice", f"AttachedDevice {place}", 1), value)
            element.remove(device)
        for known in ("name", "PortCount", "useHostIOCache", "Bootable"):
            settings.take(element, known)
        for key in [key for key in element.attrib if key.startswith("IDE")]:
            settings.take(element, key)
    ordered = tuple(disk for _, disk in sorted(disks, key=lambda pair: pair[0]))
    by_port = sorted(removables, key=lambda one: (one[0], one[1], one[2].unit or 0))
    drives = tuple(drive for _, _, drive in by_port)
    return Storage(controllers(types, [*ordered, *drives]), ordered, drives)


def _old(settings: Settings) -> list[Element]:
    return settings.machine.findall(f"{NS}StorageControllers/{NS}StorageController")


def _registry(settings: Settings) -> Iterator[tuple[UUID, _Medium]]:
    registry = settings.machine.find(f"{NS}MediaRegistry")
    if registry is None:
        return
    for place, root in enumerate(registry.iterfind(f"{NS}HardDisks/{NS}HardDisk")):
        yield from _family(settings, root, root.get("type", "Normal"), place, ())
    for element in (*registry.iterfind(f"{NS}DVDImages/{NS}Image"), *registry.iterfind(f"{NS}FloppyImages/{NS}Image")):
        yield _identity(settings, element), _Medium(element.get("location", ""), None, "", 0)


def _family(
    settings: Settings, element: Element, kind: str, place: int, layers: tuple[Layer, ...]
) -> Iterator[tuple[UUID, _Medium]]:
    """Yields a disk of the registry and all that were made on it."""
    identity, location, form = _identity(settings, element), element.get("location", ""), element.get("format")
    for key, value in unknown(element, "HardDisk", _KNOWN_DISK):
        settings.keep(key.replace("HardDisk", f"HardDisk {identity}", 1), value)
    if any(each.get("name", "").startswith("CRYPT/") for each in element.iterfind(f"{NS}Property")):
        hint = "remove the encryption in VirtualBox first"
        raise refused(settings.file, f"HardDisk {identity}", "the disk is encrypted", hint=hint)
    yield identity, _Medium(location, form, kind, place, layers)
    neutral = FORMATS.get((form or "").upper())
    for child in element.iterfind(f"{NS}HardDisk"):
        values = {"file": location, "format": neutral, "image_uuid": registered(identity, neutral)}
        own = part(settings.file, f"HardDisk {identity}", Layer, **values)
        yield from _family(settings, child, kind, place, (own, *layers))


def _identity(settings: Settings, element: Element) -> UUID:
    return settings.as_uuid(f"{element.tag.removeprefix(NS)} uuid", element.get("uuid", ""))


def _place(settings: Settings, device: Element, name: str, index: int) -> dict[str, Any]:
    kind = TYPES[name]
    port = settings.number("AttachedDevice", "port", 0, kind.ports - 1, "0", at=device)
    unit = settings.number("AttachedDevice", "device", 0, 1, "0", at=device)
    if kind.bus == "ide":
        return {"bus": "ide", "controller": port, "unit": unit}
    return {"bus": kind.bus, "controller": index, "unit": unit if kind.bus == "floppy" else port}


def _image(settings: Settings, device: Element) -> UUID | None:
    image = device.find(f"{NS}Image")
    return None if image is None else _identity(settings, image)


def _disk(
    settings: Settings, device: Element, name: str, at: dict[str, Any], media: dict[UUID, _Medium]
) -> tuple[int, Disk]:
    element = f"AttachedDevice {at['bus']}{at['controller']}:{at['unit']}"
    identity = _image(settings, device)
    if identity is None:
        raise refused(settings.file, element, "has no Image")
    medium = media.get(identity)
    if medium is None or not medium.location:
        raise refused(settings.file, element, f"image {identity} is not in the MediaRegistry")
    discard = device.get("discard")
    port = at["controller"] * 2 + at["unit"] if at["bus"] == "ide" else at["unit"]
    key = serial_key(TYPES[name].kind, port)
    found = part(
        settings.file,
        element,
        Disk,
        **at,
        **_source(medium),
        image_uuid=registered(identity, FORMATS.get((medium.format or "").upper())),
        layers=medium.layers,
        mode=MODES.get(medium.type, "persistent"),
        shared=True if medium.type == "Shareable" else None,
        discard=None if discard is None else settings.boolean(f"{element} discard", discard),
        serial=settings.extra_data(key) if key else None,
    )
    return medium.place, found


def _source(medium: _Medium) -> dict[str, str | None]:
    if medium.format and medium.format.upper() == "ISCSI":
        return {"device": medium.location}
    return {"file": medium.location, "format": FORMATS.get((medium.format or "").upper())}


def _removable(settings: Settings, device: Element, at: dict[str, Any], media: dict[UUID, _Medium]) -> Removable:
    element = f"AttachedDevice {at['bus']}{at['controller']}:{at['unit']}"
    kinds = {"DVD": "cdrom", "Floppy": "floppy"}
    if device.get("type") not in kinds:
        raise refused(settings.file, f"{element} type", f"{quoted(device.get('type'))} is not known")
    identity, host = _image(settings, device), device.find(f"{NS}HostDrive")
    medium = media.get(identity) if identity else None
    drive = None if host is None else host.get("src") or None
    return part(
        settings.file,
        element,
        Removable,
        **at,
        kind=kinds[device.get("type", "")],
        # Images of the global registry are only named by their identity.
        file=medium.location if medium else None,
        device=drive,
        connected=identity is not None or drive is not None,
    )
