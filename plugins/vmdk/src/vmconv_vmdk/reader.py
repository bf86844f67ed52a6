"""Reads VMDK images: the descriptor lists the extents of the disk, in order, and the parent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args
from uuid import UUID

import numpy as np

from vmconv.plugin import (
    Columns,
    DiskFacts,
    Extents,
    File,
    Geometry,
    Image,
    ImageError,
    Kind,
    Opener,
    PlanError,
    Source,
    UsageError,
    described_beside,
    is_foreign,
    overlaps,
)
from vmconv_vmdk import descriptor as descriptors
from vmconv_vmdk import structs
from vmconv_vmdk.descriptor import FIRST_CID, FLAT_KINDS, NO_PARENT, SPARSE_KINDS, Descriptor, Part
from vmconv_vmdk.esx import Cowd, SeSparse
from vmconv_vmdk.hosted import Hosted
from vmconv_vmdk.options import FLAT, AdapterType, Options, Subformat

_NUMBERS = {"hwversion": "virtualhwversion", "toolsversion": "toolsversion"}
"""Options, and the lines of "ddb" that state them."""
_TYPES_OF_QEMU = frozenset(
    {"monolithicFlat", "vmfs", "vmfsSparse", "seSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"}
)


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the image whose descriptor or only extent is `file`. Other extents are opened with the table."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: VMDK has no internal snapshots, {snapshot!r} was asked for")
    disk = _Disk(file, opener)

    def load_guest() -> Extents:
        table = disk.table()
        image.warnings = tuple(dict.fromkeys((*image.warnings, *disk.warnings)))
        return table

    described = disk.descriptor
    image = VmdkImage(
        "vmdk",
        file,
        disk.size,
        load_guest,
        load_parent=disk.parent if described.parent_cid != NO_PARENT else None,
        parent_reference=described.parent if described.parent_cid != NO_PARENT else None,
        parent_format="vmdk" if described.parent_cid != NO_PARENT else None,
        facts=_facts(described),
        losses=tuple(_losses(described)),
        warnings=tuple(disk.warnings),
        details=disk.details,
        shows_holes=lambda shown: any(shown is file for file in disk.flat_files),
        dependencies=() if disk.whole else tuple(described.dependencies()),
    )
    image.disk_of_extents = disk
    return image


class VmdkImage(Image):
    """A VMDK with access to its extents, for the check."""

    disk_of_extents: _Disk

    @property
    def is_extent(self) -> bool:
        """True if the image's file holds the disk, not only its descriptor."""
        return self.disk_of_extents.whole is not None

    def extents(self) -> list[Hosted | Cowd | SeSparse]:
        """Returns the sparse extents, their headers checked."""
        return self.disk_of_extents.sparse_extents()


def options_of(image: Image) -> Options:
    """Returns the options with which the writer makes an image like this one."""
    assert isinstance(image, VmdkImage)
    described, whole = image.disk_of_extents.descriptor, image.disk_of_extents.whole
    kind, sparse = described.create_type, image.disk_of_extents.sparse_extents()
    referring = any(dependency.fingerprint for dependency in image.dependencies)
    written = {*FLAT, "twoGbMaxExtentSparse"} if whole is None else {"monolithicSparse"}
    if kind not in written or referring or not all(isinstance(one, Hosted) for one in sparse):
        raise PlanError(
            f"{image.file.name}: a VMDK of type {'reference' if referring else kind!r} is always rebuilt as a whole",
            hint="vmconv convert --force",
        )
    numbers = {field: described.values.get(f"ddb.{key}", "") for field, key in _NUMBERS.items()}
    # The id of VirtualBox needs no option: all images have one.
    adapter, identity = image.facts.adapter_type, _uuid(described, "ddb.uuid")
    return Options(
        subformat=cast("Subformat", kind),
        adapter_type=cast("AdapterType", adapter) if adapter in get_args(AdapterType) else None,
        zeroed_grain=any(isinstance(one, Hosted) and bool(one.flags & structs.ZEROED_GRAINS) for one in sparse),
        identity=identity.bytes if identity else None,
        **{field: number for field, number in numbers.items() if re.fullmatch(r"\d{1,10}", number)},
    )


def content_id(image: Image) -> int | None:
    """Returns the content id (CID) of a VMDK; None for other images."""
    if image.format_name != "vmdk":
        return None
    data = image.details.get("format-specific", {}).get("data", {})
    found: int | None = data.get("cid")
    return found


def virtualbox_ids(image: Image) -> tuple[UUID | None, UUID | None]:
    """Returns the ids of the disk and of its last change that VirtualBox knows it by, None for those it has not."""
    data = image.details.get("format-specific", {}).get("data", {})
    known = {name: UUID(text) for name in ("image-uuid", "modification-uuid") if (text := data.get(name))}
    return known.get("image-uuid"), known.get("modification-uuid")


def qemu_incompatibility(image: Image) -> str | None:
    """Returns why QEMU cannot read this VMDK, or reads another disk; None if it reads the same."""
    data = image.details["format-specific"]["data"]
    extents = data["extents"]
    # QEMU ignores the type and the extent lines of a descriptor inside the only extent.
    separate = "cluster-size" not in image.details
    if separate and data["create-type"] not in _TYPES_OF_QEMU:
        return f"QEMU does not read descriptors of createType {data['create-type'] or 'nothing'}"
    if separate and any(extent["format"] == "ZERO" for extent in extents):
        return "QEMU reads extents of kind ZERO as the extent before them"
    if separate and any(extent["access"] != "RW" for extent in extents):
        return "QEMU leaves out extents whose access is not RW"
    parent = image.parent_reference
    if parent and ("\\" in parent or _is_moved(parent)):
        return f"QEMU looks for its parent under the name {parent}"
    for dependency in image.dependencies:
        if _is_moved(dependency.name):
            return f"QEMU looks for an extent under the name {dependency.name}"
    return None


def _is_moved(name: str) -> bool:
    return is_foreign(name) or (os.path.isabs(name) and not os.path.lexists(name))


class _Disk:
    """A descriptor and its extents."""

    def __init__(self, file: File, opener: Opener) -> None:
        self.file = file
        self.opener = opener
        self.warnings: list[str] = []
        self.flat_files: list[File] = []
        # The extent, if it holds the descriptor and the whole disk.
        self.descriptor, self.whole = self._described()
        self.size = self.whole.size if self.whole else self.descriptor.size

    def _warn(self, text: str) -> None:
        self.warnings.append(text)

    def _described(self) -> tuple[Descriptor, Hosted | None]:
        head = self.file.read(0, min(self.file.size, 8))
        if not head.startswith((structs.SPARSE_MAGIC, structs.COWD_MAGIC, structs.SE_MAGIC)):
            return descriptors.separate(self.file), None
        if head.startswith(structs.SPARSE_MAGIC):
            extent = Hosted(self.file, self._warn)
            # QEMU reserves space for a descriptor in each part of a split disk, and leaves it empty.
            text = (extent.embedded() or b"").split(b"\0", 1)[0]
            if text.strip():
                return self._embedded(extent, descriptors.parse(text, self.file.name))
        # Only the descriptor names the parent of such an extent, and the other extents.
        raise ImageError(
            f"{self.file.name}: is an extent of a disk, without its descriptor",
            hint=described_beside(self.file.path) or "name the disk's descriptor, a small text file",
        )

    def _embedded(self, extent: Hosted, described: Descriptor) -> tuple[Descriptor, Hosted | None]:
        if not extent.size:
            # A header without a capacity only holds the descriptor of a disk in other files.
            return described, None
        if len(described.parts) > 1:
            raise ImageError(
                f"{self.file.name}: embedded descriptor names {len(described.parts)} extents, only one is possible"
            )
        return described, extent

    # -- the table

    def table(self) -> Extents:
        """Returns the table of the disk, extent by extent."""
        if self.whole:
            return self.whole.table()
        files: dict[str, File] = {}
        used: set[tuple[int, int]] = set()
        tables = []
        for part in self.descriptor.parts:
            if part.kind == "ZERO":
                tables.append(Extents.filled(part.size))
                continue
            if part.access == "NOACCESS":
                self._warn(f"{self.file.name}: {part.size} bytes that the guest may not read are converted as zeros")
                tables.append(Extents.filled(part.size))
                continue
            name = part.name or ""
            if name not in files:
                files[name] = self._opened(name)
            identity = files[name].stamp[:2]
            if part.kind not in FLAT_KINDS and identity in used:
                raise ImageError(f"{self.file.name}: extent {name!r} is named twice")
            used.add(identity)
            tables.append(self._flat(part, files[name]) if part.kind in FLAT_KINDS else self._sparse(part, files[name]))
        table = _concatenated(tables)
        for file in self.flat_files:
            # Reading is safe: extents may name any range of a file. Writing would change both.
            if found := overlaps(table, file):
                self._warn(f"{file.name}: {found.text(0)}")
        return table

    def _opened(self, name: str) -> File:
        """Returns the file of an extent. If it was found beside the descriptor, no identity verifies it."""
        recorded = any(one.name == name and one.fingerprint for one in self.descriptor.dependencies())
        file = self.opener.related(self.file, name, "extent", moved=not recorded)
        if (is_foreign(name) or os.path.isabs(name)) and file.path != name:
            self._warn(f"{self.file.name}: extent {name!r} does not exist: using {file.name} beside it")
        return file

    def _flat(self, part: Part, file: File) -> Extents:
        offset = part.offset * structs.SECTOR
        if offset + part.size > file.size:
            raise ImageError(
                f"{self.file.name}: extent {part.name!r}: {part.size} bytes from {offset:#x} lie past the end of the "
                f"file ({file.size:#x})"
            )
        if file not in self.flat_files:
            self.flat_files.append(file)
        return Extents.of([(0, Kind.DATA, file, offset)], part.size)

    def _sparse(self, part: Part, file: File) -> Extents:
        extent = self._extent(part, file)
        if extent.size < part.size:
            raise ImageError(
                f"{file.name}: capacity of {extent.size} bytes, {self.file.name} says that it has {part.size}"
            )
        return extent.table().window(0, part.size)

    def _extent(self, part: Part, file: File) -> Hosted | Cowd | SeSparse:
        magic = file.read(0, min(8, file.size))
        if magic.startswith(structs.SPARSE_MAGIC):
            return Hosted(file, self._warn)
        if magic.startswith(structs.COWD_MAGIC):
            return Cowd(file)
        if magic == structs.SE_MAGIC:
            return SeSparse(file)
        raise ImageError(f"{file.name}: magic at 0x0: {magic[:4].hex()} is not that of a {part.kind} extent")

    def sparse_extents(self) -> list[Hosted | Cowd | SeSparse]:
        """Returns the sparse extents. Raises the error of the first one that cannot be opened."""
        if self.whole:
            return [self.whole]
        found: list[Hosted | Cowd | SeSparse] = []
        for part in self.descriptor.parts:
            if part.kind in SPARSE_KINDS and part.access != "NOACCESS":
                found.append(self._extent(part, self._opened(part.name or "")))
        return found

    # -- the parent

    def parent(self) -> Image:
        """Returns the layer below. Raises `ImageError` if it has changed since this layer was made."""
        described = self.descriptor

        def refusal(parent: Image) -> ImageError | None:
            found = content_id(parent)
            if found == described.parent_cid:
                return None
            has = "has none" if found is None else f"is {found:08x}"
            return ImageError(
                f"{self.file.name}: parentCID {described.parent_cid:08x}: the CID of {parent.file.name} {has}",
                hint="the parent was written to after this layer was made, or is another disk",
            )

        def search() -> str | None:
            # Disks that were never written have the same CID.
            new = described.parent_cid == FIRST_CID
            return None if new else self.opener.alike(self.file, "vmdk", (".vmdk",), refusal)

        return self.opener.parent_by_identity(self.file, (described.parent or "",), "vmdk", refusal, search)

    # -- facts

    def details(self) -> Mapping[str, Any]:
        """Returns qemu-img's format-specific facts, under its names."""
        described = self.descriptor
        facts: dict[str, Any] = {
            "cid": described.cid,
            "parent-cid": described.parent_cid,
            "create-type": described.create_type,
            "extents": [self._facts(part) for part in described.parts],
        }
        if identity := described.values.get("ddb.longcontentid"):
            facts["long-content-id"] = identity
        for name in ("image", "modification"):
            if found := _uuid(described, f"ddb.uuid.{name}"):
                facts[f"{name}-uuid"] = str(found)
        details: dict[str, Any] = {"format-specific": {"type": "vmdk", "data": facts}}
        if self.whole:
            details["cluster-size"] = self.whole.grain
            details["dirty-flag"] = bool(self.whole.header.uncleanShutdown)
        return details

    def _facts(self, part: Part) -> dict[str, Any]:
        facts = {
            "format": part.kind,
            "virtual-size": part.size,
            "filename": part.name or "",
            "access": part.access,
        }
        if self.whole:
            facts |= {
                "virtual-size": self.whole.size,
                "filename": self.file.name,
                "cluster-size": self.whole.grain,
                "compressed": self.whole.compressed,
            }
        return facts


def _concatenated(tables: Sequence[Extents]) -> Extents:
    """Returns the concatenated tables."""
    sources: list[Source] = []
    index: dict[int, int] = {}
    parts = []
    at = 0
    for table in tables:
        for source in table.sources:
            if id(source) not in index:
                index[id(source)] = len(sources)
                sources.append(source)
        # The extra last element is for -1, the index of rows without a source.
        renumber = np.array([index[id(source)] for source in table.sources] + [-1], dtype=np.int32)
        parts.append(Columns(table.start + at, table.kind, renumber[table.source], table.offset))
        at += table.size
    return Extents(at, Columns.join(parts), sources)


def _facts(described: Descriptor) -> DiskFacts:
    """Returns the facts in the disk database; invalid values are ignored."""
    adapter = described.values.get("ddb.adaptertype", "")
    return DiskFacts(
        identity=_identity(described),
        geometry=_geometry(described),
        adapter_type=adapter if 0 < len(adapter) <= 64 and adapter.isprintable() else None,
    )


def _identity(described: Descriptor) -> UUID | None:
    return _uuid(described, "ddb.uuid") or _uuid(described, "ddb.uuid.image")


def _uuid(described: Descriptor, key: str) -> UUID | None:
    """Returns an id of the disk database; None if it is missing, invalid or all zeros."""
    text = re.sub(r"[\s{}-]", "", described.values.get(key, ""))
    return UUID(text) if re.fullmatch(r"[0-9a-fA-F]{32}", text) and int(text, 16) else None


def _geometry(described: Descriptor) -> Geometry | None:
    numbers = [described.values.get(f"ddb.geometry.{name}", "") for name in Geometry._fields]
    if not all(re.fullmatch(r"\d{1,5}|\d{6,9}", number) for number in numbers):
        return None
    found = Geometry(*map(int, numbers))
    sound = found.heads < 1 << 16 and found.sectors < 1 << 16
    return found if sound and not _follows_from_size(described, found) else None


def _follows_from_size(described: Descriptor, geometry: Geometry) -> bool:
    """True for the default geometry of disks of this size, which carries no information."""
    cylinders, heads, sectors = geometry
    made = (heads, sectors) in ((16, 63), (255, 63))
    return made and cylinders == described.size // structs.SECTOR // (heads * sectors)


def _losses(described: Descriptor) -> Iterator[str]:
    tracked = described.values.get("changetrackpath")
    if tracked:
        yield f"change tracking in {tracked!r}"
    if sidecars := described.values.get("ddb.sidecars"):
        yield f"sidecar files of I/O filters: {sidecars[:80]!r}"
