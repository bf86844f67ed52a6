"""The envelope of a package: its files, disks, strings, and the configuration that is deployed by default."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple
from xml.etree.ElementTree import Element

from vmconv.machine import parse_xml, quoted, refused
from vmconv.plugin import MAX_SIZE, ImageError
from vmconv_ovf.keys import ENVELOPES, FORMATS, VMW, XSI
from vmconv_ovf.names import decoded, problem_of
from vmconv_ovf.units import bytes_of

if TYPE_CHECKING:
    from vmconv.plugin import File


class Described(NamedTuple):
    """A disk of the DiskSection: the name of its file, None for an empty disk."""

    file: str | None
    file_size: int | None
    format: str | None
    capacity: int | None


class Envelope:
    """A parsed descriptor. Raises `ImageError` if the root is no envelope of a known version."""

    def __init__(self, file: File, data: bytes | None = None) -> None:
        self.file = file
        self.root = parse_xml(file, data)
        space, _, name = self.root.tag[1:].rpartition("}")
        if name != "Envelope" or space not in ENVELOPES:
            raise self.refused("root element", f"{quoted(self.root.tag)} is no envelope of OVF 0.9, 1 or 2")
        self.space = space

    def refused(self, element: str, problem: str, *, hint: str | None = None) -> ImageError:
        return refused(self.file, element, problem, hint=hint)

    def kind(self, element: Element) -> str:
        """Returns the name of an element of the envelope's namespace or of none, or `{namespace}name` of another.

        OVF 0.9 states the type of a section by `xsi:type`, and its drafts have elements without a namespace.
        """
        space, _, name = element.tag.rpartition("}")
        if space not in ("", f"{{{self.space}"):
            return element.tag
        if name in ("Section", "Content"):
            return element.get(f"{{{XSI}}}type", name).rpartition(":")[2].removesuffix("_Type")
        return name

    def all(self, parent: Element, *kinds: str) -> Iterator[Element]:
        """Yields the children of these kinds that belong to the deployed configuration."""
        return (child for child in parent if self.kind(child) in kinds and self.deployed(child))

    def get(self, element: Element, name: str) -> str | None:
        """Returns an attribute of the envelope's namespace, or of none."""
        found = element.get(f"{{{self.space}}}{name}", element.get(name))
        return None if found is None else found.strip()

    def text(self, element: Element | None) -> str:
        """Returns the text of an element, or of the message that its `msgid` names."""
        if element is None:
            return ""
        found = "".join(element.itertext()).strip()
        return found or self.messages.get(self.get(element, "msgid") or "", "")

    def child(self, parent: Element, name: str) -> Element | None:
        return next(self.all(parent, name), None)

    def deployed(self, element: Element) -> bool:
        """True unless the element belongs to other configurations only."""
        names = self.get(element, "configuration")
        return names is None or self.configuration in names.split()

    def required(self, element: Element) -> bool:
        """True unless a reader may ignore the element."""
        return (self.get(element, "required") or "true").lower() not in ("false", "0")

    @cached_property
    def messages(self) -> dict[str, str]:
        """The messages of the first language that the descriptor itself contains."""
        for strings in (child for child in self.root if self.kind(child) == "Strings"):
            found = {self.get(each, "msgid") or "": "".join(each.itertext()).strip() for each in strings}
            if found:
                return found
        return {}

    @cached_property
    def configurations(self) -> list[str]:
        """Ids of the DeploymentOptionSection's configurations, the default one first (DSP0243, 9.8)."""
        sections = [child for child in self.root if self.kind(child) == "DeploymentOptionSection"]
        found = [each for section in sections for each in section if self.kind(each) == "Configuration"]
        found.sort(key=lambda each: (self.get(each, "default") or "false").lower() not in ("true", "1"))
        return [self.get(each, "id") or "" for each in found]

    @property
    def configuration(self) -> str | None:
        return self.configurations[0] if self.configurations else None

    # -- files and disks

    @cached_property
    def files(self) -> dict[str, Element]:
        return self._by_id("References", "File", "id")

    @cached_property
    def _disks(self) -> dict[str, Element]:
        return self._by_id("DiskSection", "Disk", "diskId")

    def _by_id(self, section: str, kind: str, attribute: str) -> dict[str, Element]:
        found: dict[str, Element] = {}
        for each in (each for part in self.all(self.root, section) for each in self.all(part, kind)):
            key = self.get(each, attribute)
            if not key:
                raise self.refused(kind, f"has no ovf:{attribute}")
            if key in found:
                raise self.refused(f"{kind} {quoted(key)}", f"two have this ovf:{attribute}")
            found[key] = each
        return found

    def file_of(self, key: str, user: str) -> tuple[str, int | None]:
        """Returns the name and the size of a file that a device uses.

        Raises `ImageError` if the file is not listed, outside the package, compressed, or in chunks.
        """
        element = self.files.get(key)
        if element is None:
            raise self.refused(user, f"refers to the file {quoted(key)}, which References does not list")
        where, href = f"File {quoted(key)}", self.get(element, "href") or ""
        problem = problem_of(href)
        if problem:
            raise self.refused(where, f"ovf:href {quoted(href)} {problem}")
        compression = self.get(element, "compression") or "identity"
        if compression != "identity":
            raise self.refused(
                where,
                f"{quoted(href)} has ovf:compression {quoted(compression)}, which is not supported",
                hint="decompress the file and remove the attribute from the descriptor",
            )
        chunk = self.get(element, "chunkSize")
        if chunk:
            raise self.refused(
                where,
                f"{quoted(href)} is stored in chunks of {chunk} bytes, which is not supported",
                hint="join the chunks with cat and remove ovf:chunkSize from the descriptor",
            )
        size = self.get(element, "size")
        return decoded(href), None if size is None else self.number(f"{where} ovf:size", size, MAX_SIZE)

    def number(self, element: str, text: str, high: int) -> int:
        from vmconv.machine import number

        return number(self.file, element, text, 0, high)

    def disk(self, key: str, user: str, properties: dict[str, str]) -> Described:
        """Returns the disk that a device uses."""
        element = self._disks.get(key)
        if element is None:
            raise self.refused(user, f"refers to the disk {quoted(key)}, which the DiskSection does not list")
        where = f"Disk {quoted(key)}"
        parent = self.get(element, "parentRef")
        if parent:
            raise self.refused(where, f"is a delta of disk {quoted(parent)}, and chains of disks are not supported")
        reference = self.get(element, "fileRef")
        name, size = self.file_of(reference, where) if reference else (None, None)
        capacity = self.capacity(
            where, self.get(element, "capacity"), self.get(element, "capacityAllocationUnits"), properties
        )
        return Described(name, size, format_of(self.get(element, "format") or ""), capacity)

    def capacity(self, where: str, text: str | None, unit: str | None, properties: dict[str, str]) -> int | None:
        """Returns a capacity in bytes: a number, or `${name}` of a property with a value, times its unit."""
        if text is None:
            return None
        if text.startswith("${") and text.endswith("}"):
            if not properties.get(text[2:-1]):
                raise self.refused(where, f"capacity {quoted(text)} is a property without a value")
            text = properties[text[2:-1]]
        size = bytes_of(unit or "byte")
        if size is None:
            raise self.refused(where, f"{quoted(unit)} is no unit of bytes")
        return self.number(f"{where} capacity", text, MAX_SIZE // size) * size


def format_of(uri: str) -> str | None:
    """Returns the name of the disk format that a URI stands for, or None."""
    return next((name for part, name in FORMATS if part in uri.lower()), None)


def configs(element: Element, tag: str = "Config") -> Iterator[tuple[str, str]]:
    """Yields the keys and the values of VMware's settings in an element."""
    for each in element:
        if each.tag == f"{{{VMW}}}{tag}":
            yield each.get(f"{{{VMW}}}key", "").strip(), each.get(f"{{{VMW}}}value", "").strip()
