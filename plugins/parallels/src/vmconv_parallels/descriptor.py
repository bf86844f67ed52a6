"""DiskDescriptor.xml: the files of a Parallels disk and its snapshots (QEMU, docs/interop/prl-xml.txt).

    Parallels_disk_image
        Disk_Parameters     Disk_size, Cylinders, Heads, Sectors, Padding, and optional elements
        StorageData         Storage: Start, End, one Image (GUID, Type, File) for each snapshot
        Snapshots           TopGUID, one Shot (GUID, ParentGUID) for each snapshot

The text is untrusted: its length, depth and number of elements are bounded. A document type, the only place that can
declare entities, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat

from vmconv.plugin import MAX_SIZE, File, ImageError
from vmconv_parallels.structs import SECTOR

MAX_LENGTH = 1 << 20
MAX_DEPTH = 32
MAX_ELEMENTS = 50_000
MAX_STORAGES = 1024
MAX_NAME = 4096

NO_GUID = "00000000-0000-0000-0000-000000000000"
TOP_GUID = "5fbaabe3-6958-40ff-92a7-860e329aab41"
"""The GUID of the current state, if the descriptor names no other."""

_GUID = re.compile(r"\{?([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})\}?")
_NUMBER = re.compile(r"[0-9]{1,19}")


@dataclass
class Element:
    """One element of the document: its stripped text, and the line of its start."""

    name: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, name: str) -> list[Element]:
        return [child for child in self.children if child.name == name]

    def first(self, name: str) -> Element | None:
        return next((child for child in self.children if child.name == name), None)


@dataclass(frozen=True)
class StoredImage:
    """The file of one snapshot of one storage."""

    plain: bool
    file: str


@dataclass(frozen=True)
class Storage:
    """A range of the disk, bytes, and its images by the GUID of their snapshot."""

    start: int
    end: int
    images: Mapping[str, StoredImage]


@dataclass(frozen=True)
class Descriptor:
    """A checked descriptor: storages are contiguous, sizes are bytes, `shots` maps snapshots to their parents."""

    size: int
    geometry: tuple[int, int, int]
    sector_size: int
    physical_sector_size: int
    uid: str
    storages: tuple[Storage, ...]
    shots: Mapping[str, str]
    top: str


def guid(text: str) -> str | None:
    """Returns a GUID in lower case without its braces; None for any other text."""
    match = _GUID.fullmatch(text.strip().lower())
    return match[1] if match else None


def read_descriptor(file: File) -> Descriptor:
    """Returns the descriptor in `file`. Raises `ImageError` with the invalid element and its line."""
    if file.size > MAX_LENGTH:
        raise ImageError(f"{file.name}: descriptor of {file.size} bytes, {MAX_LENGTH} at most")
    return _Reader(file, _parse(file)).descriptor()


def _parse(file: File) -> Element:
    """Returns the root element."""
    parser = expat.ParserCreate("utf-8")
    document = Element("", 0)
    path = [document]
    count = [0]
    texts: dict[int, list[str]] = {}

    def start(name: str, _: object) -> None:
        if len(path) > MAX_DEPTH:
            raise ImageError(f"{file.name}: line {parser.CurrentLineNumber}: elements nested over {MAX_DEPTH} deep")
        count[0] += 1
        if count[0] > MAX_ELEMENTS:
            raise ImageError(f"{file.name}: line {parser.CurrentLineNumber}: more than {MAX_ELEMENTS} elements")
        path[-1].children.append(Element(name, parser.CurrentLineNumber))
        path.append(path[-1].children[-1])

    def end(_: str) -> None:
        element = path.pop()
        element.text = "".join(texts.pop(id(element), [])).strip()

    def text(data: str) -> None:
        texts.setdefault(id(path[-1]), []).append(data)

    def doctype(*_: object) -> NoReturn:
        raise ImageError(f"{file.name}: line {parser.CurrentLineNumber}: a document type, which is refused")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text, doctype
    try:
        parser.Parse(file.read(0, file.size), True)
    except expat.ExpatError as exc:
        raise ImageError(f"{file.name}: line {exc.lineno}: {expat.ErrorString(exc.code)}") from exc
    return document.children[0]


class _Reader:
    """Parses the elements of one document."""

    def __init__(self, file: File, root: Element) -> None:
        self.file = file
        self.root = root

    def descriptor(self) -> Descriptor:
        if self.root.name != "Parallels_disk_image":
            self._refuse(self.root, "is not Parallels_disk_image")
        parameters = self._need(self.root, "Disk_Parameters")
        self._refuse_encryption(parameters)
        padding = parameters.first("Padding")
        if padding is not None and self._value(padding):
            self._refuse(padding, f"{padding.text} is not 0, an undocumented value")
        size = self._number(parameters, "Disk_size") * SECTOR
        storages = self._storages(size)
        shots, top = self._shots(storages)
        uid = parameters.first("UID")
        return Descriptor(
            size=size,
            geometry=(
                self._number(parameters, "Cylinders", 0),
                self._number(parameters, "Heads", 0),
                self._number(parameters, "Sectors", 0),
            ),
            sector_size=self._number(parameters, "LogicSectorSize", SECTOR),
            physical_sector_size=self._number(parameters, "PhysicalSectorSize", 0),
            uid=(guid(uid.text) if uid else None) or NO_GUID,
            storages=storages,
            shots=shots,
            top=top,
        )

    def _refuse(self, element: Element, problem: str) -> NoReturn:
        raise ImageError(f"{self.file.name}: {element.name[:40]} at line {element.line}: {problem}")

    def _need(self, parent: Element, name: str) -> Element:
        found = parent.first(name)
        if found is None:
            self._refuse(parent, f"has no {name}")
        return found

    def _value(self, element: Element) -> int:
        if not _NUMBER.fullmatch(element.text) or int(element.text) > MAX_SIZE // SECTOR:
            self._refuse(element, f"{element.text[:40]!r} is not a number in 0..{MAX_SIZE // SECTOR}")
        return int(element.text)

    def _number(self, parent: Element, name: str, default: int | None = None) -> int:
        found = parent.first(name)
        if found is None and default is not None:
            return default
        return self._value(found or self._need(parent, name))

    def _guid(self, element: Element) -> str:
        found = guid(element.text)
        if found is None:
            self._refuse(element, f"{element.text[:40]!r} is not a GUID")
        return found

    def _refuse_encryption(self, parameters: Element) -> None:
        encryption = parameters.first("Encryption")
        engine = encryption.first("Engine") if encryption else None
        if engine is not None and engine.text and self._guid(engine) != NO_GUID:
            self._refuse(engine, f"encryption by {engine.text} is not supported")

    def _storages(self, size: int) -> tuple[Storage, ...]:
        data = self._need(self.root, "StorageData")
        elements = data.all("Storage")
        if not 0 < len(elements) <= MAX_STORAGES:
            self._refuse(data, f"{len(elements)} storages, not in 1..{MAX_STORAGES}")
        found = sorted((self._storage(element) for element in elements), key=lambda storage: storage.start)
        at = 0
        for storage in found:
            if storage.start != at or storage.end <= at:
                begin, end = storage.start // SECTOR, storage.end // SECTOR
                self._refuse(data, f"a storage of sectors {begin}..{end} after sector {at // SECTOR}")
            at = storage.end
        if at != size:
            self._refuse(data, f"storages end at sector {at // SECTOR}, Disk_size is {size // SECTOR}")
        return tuple(found)

    def _storage(self, element: Element) -> Storage:
        images = {}
        for image in element.all("Image"):
            key = self._guid(self._need(image, "GUID"))
            kind, name = self._need(image, "Type"), self._need(image, "File")
            if kind.text not in ("Plain", "Compressed"):
                self._refuse(kind, f"{kind.text[:40]!r} is neither Plain nor Compressed")
            if not 0 < len(name.text) <= MAX_NAME:
                self._refuse(name, f"a name of {len(name.text)} characters, not in 1..{MAX_NAME}")
            if key in images:
                self._refuse(image, f"a second image of {key}")
            images[key] = StoredImage(kind.text == "Plain", name.text)
        start, end = self._number(element, "Start"), self._number(element, "End")
        return Storage(start * SECTOR, end * SECTOR, images)

    def _shots(self, storages: tuple[Storage, ...]) -> tuple[Mapping[str, str], str]:
        snapshots = self.root.first("Snapshots")
        if snapshots is None:
            # A disk without snapshots has one image and needs no tree.
            only = next(iter(storages[0].images), TOP_GUID)
            return {only: NO_GUID}, only
        shots = {}
        for shot in snapshots.all("Shot"):
            key = self._guid(self._need(shot, "GUID"))
            if key in shots:
                self._refuse(shot, f"a second snapshot {key}")
            shots[key] = self._guid(self._need(shot, "ParentGUID"))
        top = snapshots.first("TopGUID")
        key = self._guid(top) if top else TOP_GUID
        if key not in shots:
            self._refuse(snapshots, f"the current state {key} is not one of {len(shots)} snapshots")
        return shots, key
