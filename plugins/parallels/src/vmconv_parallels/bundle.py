"""Reads a Parallels disk by its descriptor: each snapshot is a layer on top of its parent's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vmconv.plugin import (
    MAX_CHAIN_DEPTH,
    Columns,
    Dependency,
    DiskFacts,
    Extents,
    File,
    Geometry,
    Image,
    ImageError,
    Opener,
    Source,
    UsageError,
    counted,
    named_by,
)
from vmconv_parallels import reader
from vmconv_parallels.descriptor import NO_GUID, Descriptor, Storage, guid, read_descriptor
from vmconv_parallels.reader import Header

if TYPE_CHECKING:
    from uuid import UUID


class Layer(Image):
    """A layer of a disk with a descriptor: `headers` are those of its images; plain images have none."""

    headers: tuple[Header, ...] = ()


def headers_of(image: Image) -> tuple[Header, ...]:
    """Returns the headers of a layer's images."""
    return image.headers if isinstance(image, Layer) else (reader.read_header(image.file),)


def read_bundle(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the disk of the descriptor in `file`, or its snapshot with this GUID."""
    descriptor = read_descriptor(file)
    return _layer(file, opener, descriptor, _chain(file, descriptor, snapshot))


def _chain(file: File, descriptor: Descriptor, snapshot: str | None) -> list[str]:
    """Returns the GUIDs of the snapshot and its ancestors, down to the root."""
    shots = descriptor.shots
    chosen = descriptor.top if snapshot is None else guid(snapshot)
    if chosen is None or chosen not in shots:
        raise UsageError(f"{file.name}: no snapshot {snapshot!r}", hint=f"its snapshots: {', '.join(shots)}")
    chain = [chosen]
    while shots[chain[-1]] != NO_GUID:
        parent = shots[chain[-1]]
        if parent not in shots:
            raise ImageError(f"{file.name}: ParentGUID of {chain[-1]}: there is no snapshot {parent}")
        if parent in chain:
            raise ImageError(f"{file.name}: ParentGUID of {chain[-1]}: {parent} is above it, a loop")
        chain.append(parent)
        if len(chain) > MAX_CHAIN_DEPTH:
            raise ImageError(f"{file.name}: chain of more than {MAX_CHAIN_DEPTH} layers")
    return chain


def _layer(file: File, opener: Opener, descriptor: Descriptor, chain: list[str], *, below: bool = False) -> Image:
    """Returns the first layer of `chain`. The layer below is opened on first use."""
    parts = [_Part(file, opener, storage, chain[0]) for storage in descriptor.storages]
    if len({part.file.stamp[:2] for part in parts}) < len(parts):
        raise ImageError(f"{file.name}: snapshot {chain[0]}: two of its {len(parts)} storages have one image")
    rest = chain[1:]
    headers = [part.header for part in parts if part.header]
    losses = [text for header in headers for text in reader.losses(header)]
    # Only a root in one storage is an image of its own, and can be kept as a parent.
    alone = below and not rest and len(parts) == 1
    layer = Layer(
        "parallels",
        parts[0].file if alone else file,
        descriptor.size,
        lambda: _joined([part.table() for part in parts], descriptor.size),
        load_parent=(lambda: _layer(file, opener, descriptor, rest, below=True)) if rest else None,
        parent_reference=_image_of(file, descriptor.storages[0], rest[0]) if rest else None,
        parent_format="parallels" if rest else None,
        facts=_facts(descriptor),
        losses=(*(() if below else _losses(descriptor)), *losses),
        warnings=tuple(text for header in headers for text in reader.warnings(header)),
        details=lambda: _details(descriptor, headers),
        dependencies=tuple(
            Dependency(
                "image", storage.images[chain[0]].file, storage.end - storage.start if part.header is None else 0
            )
            for storage, part in zip(descriptor.storages, parts, strict=True)
        ),
        shows_holes=lambda file: any(part.file is file and part.header is None for part in parts),
    )
    layer.headers = tuple(headers)
    return layer


def _image_of(file: File, storage: Storage, shot: str) -> str:
    if shot not in storage.images:
        raise ImageError(f"{file.name}: storage at sector {storage.start // 512}: no image of snapshot {shot}")
    return named_by(storage.images[shot].file)


class _Part:
    """One storage of one layer, with its file open."""

    def __init__(self, file: File, opener: Opener, storage: Storage, shot: str) -> None:
        self.file = opener.related(file, _image_of(file, storage, shot), "image")
        self.length = storage.end - storage.start
        self.header: Header | None = None
        if not storage.images[shot].plain:
            self.header = reader.read_header(self.file)

    def table(self) -> Extents:
        if self.header is None:
            return Extents.whole(self.file).window(0, self.length).without_holes()
        return reader.read_table(self.header).window(0, self.length)


def _joined(tables: list[Extents], size: int) -> Extents:
    """Returns the concatenated tables of the storages."""
    parts: list[Columns] = []
    sources: list[Source] = []
    at = 0
    for table in tables:
        source = np.where(table.source >= 0, table.source + len(sources), -1).astype(np.int32)
        parts.append(table.columns._replace(start=table.start + at, source=source))
        sources += table.sources
        at += table.size
    return Extents(size, Columns.join(parts), sources)


def _facts(descriptor: Descriptor) -> DiskFacts:
    cylinders, heads, sectors = descriptor.geometry
    known = 0 < cylinders < 1 << 32 and 0 < heads < 1 << 16 and 0 < sectors < 1 << 16
    logical, physical = descriptor.sector_size, descriptor.physical_sector_size
    return DiskFacts(
        logical_sector_size=logical if logical == 4096 else None,
        physical_sector_size=physical if physical in (512, 4096) else None,
        identity=_identity(descriptor),
        geometry=Geometry(cylinders, heads, sectors) if known else None,
    )


def _identity(descriptor: Descriptor) -> UUID | None:
    if descriptor.uid == NO_GUID:
        return None
    from uuid import UUID

    return UUID(descriptor.uid)


def _losses(descriptor: Descriptor) -> Iterator[str]:
    others = len(descriptor.shots) - 1
    if others:
        yield f"{counted(others, 'other snapshot')} (convert --snapshot converts one)"


def _details(descriptor: Descriptor, headers: list[Header]) -> Mapping[str, Any]:
    facts: dict[str, Any] = {"dirty-flag": any(header.in_use for header in headers)}
    if headers:
        facts["cluster-size"] = headers[0].cluster_size
    facts["format-specific"] = {
        "type": "parallels",
        "data": {"top": descriptor.top, "snapshots": dict(descriptor.shots), "storages": len(descriptor.storages)},
    }
    return facts
