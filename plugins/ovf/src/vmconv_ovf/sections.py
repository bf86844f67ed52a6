"""The sections around a machine's hardware: which system there is, its product, properties, licences and boot order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from xml.etree.ElementTree import Element

from vmconv.machine import Property, part, quoted
from vmconv_ovf import keys
from vmconv_ovf.envelope import Envelope

_SYSTEMS = ("VirtualSystem", "VirtualSystemCollection")
_CHUNK = 60_000
"""Characters of a part of a licence text, less than the model's limit."""

_SHOWN = 8
"""Systems that an error names."""


class System(NamedTuple):
    """The only virtual system, and the elements around it, the envelope first."""

    envelope: Envelope
    holders: tuple[Element, ...]
    element: Element

    def all(self, kind: str) -> Iterator[Element]:
        """Yields the sections of a kind in the system and around it."""
        for holder in (*self.holders, self.element):
            yield from self.envelope.all(holder, kind)


def only_system(envelope: Envelope) -> System:
    """Returns the virtual system of an envelope.

    Raises `ImageError` if there is none or more than one, and for a section that is required and not known.
    """
    found = list(_systems(envelope, envelope.root, (envelope.root,)))
    if not found:
        raise envelope.refused("Envelope", "has no VirtualSystem")
    if len(found) > 1:
        names = [quoted(envelope.get(system.element, "id") or "") for system in found]
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise envelope.refused(
            "VirtualSystemCollection",
            f"has {len(names)} virtual systems: {shown}",
            hint="keep one VirtualSystem in the descriptor for each conversion",
        )
    for element in (*found[0].holders, found[0].element):
        _refuse_unknown_sections(envelope, element)
    return found[0]


def _systems(envelope: Envelope, parent: Element, holders: tuple[Element, ...]) -> Iterator[System]:
    for child in parent:
        kind = envelope.kind(child)
        if kind == "VirtualSystem":
            yield System(envelope, holders, child)
        elif kind == "VirtualSystemCollection":
            yield from _systems(envelope, child, (*holders, child))


def _refuse_unknown_sections(envelope: Envelope, element: Element) -> None:
    """Raises `ImageError` for sections that must be understood and are not (DSP0243, 9)."""
    for child in element:
        kind = envelope.kind(child)
        known = kind in keys.KNOWN_SECTIONS or kind in _SYSTEMS or kind.startswith(keys.KNOWN_NAMESPACES)
        if not known and envelope.required(child) and envelope.deployed(child):
            raise envelope.refused(kind, "section is required by the package and not known")


def hardware(system: System) -> Element:
    """Returns the first hardware section: the others are alternatives to it (DSP0243, 8.1)."""
    found = system.envelope.child(system.element, "VirtualHardwareSection")
    if found is None:
        raise system.envelope.refused("VirtualSystem", "has no VirtualHardwareSection")
    return found


def boot_order(system: System) -> dict[str, int]:
    """Returns the places of items in VMware's boot order by their ids."""
    listed = [each for each in system.element if each.tag == f"{{{keys.VMW}}}BootOrderSection"]
    found = [each.get(f"{{{keys.VMW}}}instanceId", "") for each in listed]
    return {key: place for place, key in enumerate(dict.fromkeys(each for each in found if each))}


def properties(system: System) -> tuple[tuple[Property, ...], dict[str, str]]:
    """Returns the properties of the deployed configuration, and what else the product sections state."""
    extra: dict[str, str] = {}
    found: dict[str, Property] = {}
    for section in system.all("ProductSection"):
        for key, text in _product(system.envelope, section).items():
            extra.setdefault(key, text)
        for element in system.envelope.all(section, "Property"):
            made = _property(system.envelope, section, element, extra)
            if made.key in found:
                raise system.envelope.refused(f"Property {quoted(made.key)}", "two have this key")
            found[made.key] = made
    return tuple(found.values()), extra


def _product(envelope: Envelope, section: Element) -> dict[str, str]:
    """Returns the texts about the product, of sections without a class."""
    if envelope.get(section, "class"):
        return {}
    texts = ((name, envelope.text(envelope.child(section, name))) for name in keys.PRODUCT)
    return {f"product.{name}": text for name, text in texts if text}


def _property(envelope: Envelope, section: Element, element: Element, extra: dict[str, str]) -> Property:
    """Returns a property; its key is that of the guest's environment (DSP0243, 9.5)."""
    key = envelope.get(element, "key")
    if not key:
        raise envelope.refused("Property", "has no ovf:key")
    name = ".".join(each for each in (envelope.get(section, "class"), key, envelope.get(section, "instance")) if each)
    for each in keys.PROPERTY:
        stated = envelope.get(element, each)
        if stated is not None and (each, stated) != ("type", "string"):
            extra[f"property.{name}.{each}"] = stated
    if description := envelope.text(envelope.child(element, "Description")):
        extra[f"property.{name}.description"] = description
    values = [envelope.get(each, "value") for each in envelope.all(element, "Value")]
    return part(
        envelope.file,
        f"Property {quoted(name)}",
        Property,
        key=name,
        value=values[0] if values else envelope.get(element, "value"),
        label=envelope.text(envelope.child(element, "Label")) or None,
    )


def licences(system: System) -> dict[str, str]:
    """Returns the licence texts in parts."""
    envelope = system.envelope
    text = "\n\n".join(envelope.text(envelope.child(each, "License")) for each in system.all("EulaSection"))
    return {f"eula.{number}": each for number, each in enumerate(_parts(text))}


def _parts(text: str) -> Iterator[str]:
    """Yields parts of a text without white space at their ends, which the model would remove."""
    at = 0
    while at < len(text):
        end = at + _CHUNK
        while at < end < len(text) and (text[end - 1].isspace() or text[end].isspace()):
            end -= 1
        end = end if end > at else at + _CHUNK
        yield text[at:end]
        at = end
