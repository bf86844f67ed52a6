"""Writes VMDK images: a pure function from the guest's table to the tables of the output files.

monolithicSparse       name.vmdk, one sparse extent with the descriptor inside
twoGbMaxExtentSparse   name-s001.vmdk ..., sparse extents, and name.vmdk, the descriptor
monolithicFlat, vmfs   name-flat.vmdk, the disk itself, and name.vmdk, the descriptor
twoGbMaxExtentFlat     name-f001.vmdk ..., parts of the disk itself, and name.vmdk, the descriptor
streamOptimized        name.vmdk, compressed, see stream.py
reference              name.vmdk, the descriptor of extents in the source's files, see reference.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args
from uuid import UUID

from vmconv.plugin import (
    Backing,
    Blob,
    Extents,
    Geometry,
    Image,
    Layout,
    OutFile,
    Placement,
    PlanError,
    Record,
    blocks,
    derived,
)
from vmconv_vmdk import structs
from vmconv_vmdk.descriptor import NO_PARENT, Part, recorded, render
from vmconv_vmdk.grains import GRAIN, SparseExtent
from vmconv_vmdk.options import FLAT, MAX_SECTORS, REFERENCE, SPLIT_SECTORS, AdapterType, Options, extent_names
from vmconv_vmdk.reader import content_id, virtualbox_ids

DESCRIPTOR_SECTORS = 20
"""Space for an embedded descriptor, as in VMware and QEMU."""

_NIL = UUID(int=0)


def write(image: Image, options: Options, placement: Placement, *, backing: Backing | None = None) -> Layout:
    """Returns the layout of the VMDK `placement.target`; raises `PlanError` if the subformat cannot hold the disk."""
    return _Writer(image, options, placement, backing).layout()


class _Writer:
    def __init__(self, image: Image, options: Options, placement: Placement, backing: Backing | None) -> None:
        self.image = image
        self.options = options
        self.placement = placement
        self.modulus = placement.modulus
        self.carrier = placement.carrier
        self.backing = backing
        self.name = placement.target
        # A disk is whole sectors.
        self.sectors = -(-image.size // structs.SECTOR)
        self.size = self.sectors * structs.SECTOR
        self._check_request()
        self.losses: list[str] = []
        self.guest = self._guest()

    def _check_request(self) -> None:
        subformat = self.options.subformat
        for text, what in ((self.name, "file name"), (self.backing.reference if self.backing else "", "backing file")):
            if any(character in text for character in '"\n\r\0'):
                raise PlanError(f"VMDK descriptor cannot hold the {what} {text!r}")
        if not 1 <= self.sectors <= MAX_SECTORS:
            nearest = structs.SECTOR * (MAX_SECTORS if self.sectors else 1)
            raise PlanError(f"VMDK cannot hold {self.image.size} bytes, the nearest size it can hold is {nearest}")
        if self.backing and (self.options.flat or subformat in ("streamOptimized", REFERENCE)):
            raise PlanError(f"{subformat} cannot have a backing file", hint="use -o subformat=monolithicSparse")
        if self.carrier and subformat not in ("monolithicSparse", "monolithicFlat", "vmfs"):
            raise PlanError(f"{subformat} cannot be made in place", hint="use -o subformat=monolithicSparse")
        if self.backing:
            self._check_parent(self.backing)

    def _check_parent(self, backing: Backing) -> None:
        if backing.format != "vmdk":
            raise PlanError(f"a VMDK's parent must be a VMDK, {backing.reference} is {backing.format}")
        if self.image.parent:
            backing.refuse_other_size("VMDK", self.size, self.image.parent)

    def _guest(self) -> Extents:
        """Returns the table to write: whole sectors, or for a sparse disk whole grains."""
        if self.options.flat or self.options.subformat == REFERENCE:
            return blocks.grown(self.image, self.size, on_parent=False)
        table = blocks.grown(self.image, self.size, on_parent=self.backing is not None)
        if self.carrier:
            # The size of grains is not known yet.
            return table
        table = blocks.padded(table, GRAIN)
        if self.backing and self.image.parent:
            table = blocks.fill_partial_holes(table, self.image.parent.flat.window(0, table.size), GRAIN)
        return table

    def layout(self) -> Layout:
        if self.options.subformat == REFERENCE:
            return self._referring()
        parts = self._parts()
        text = self._descriptor(parts)
        if self.options.subformat == "streamOptimized":
            from vmconv_vmdk.stream import stream

            table = stream(self.guest, self.image.file, self.size, self._embedded(text))
            return Layout((OutFile(table),), tuple(self.losses))
        if self.options.subformat == "monolithicSparse":
            table = self._sparse(self.guest, self.size, self._embedded(text))
            return Layout((OutFile(table, slack=True),), tuple(self.losses))
        files = []
        at = 0
        for part in parts:
            window = self.guest.window(at, part.size)
            table = window if self.options.flat else self._sparse(window, part.size, None)
            files.append(OutFile(table, part.name))
            at += part.size
        files.append(OutFile(Extents.whole(Blob("descriptor", text))))
        return Layout(tuple(files), tuple(self.losses))

    def _referring(self) -> Layout:
        from vmconv_vmdk.reference import refer_to_source

        found = refer_to_source(self.guest, f"{self.name.removesuffix('.vmdk')}-rest.vmdk", self.placement)
        text = self._descriptor(found.parts, found.records)
        files = (*found.rest, OutFile(Extents.whole(Blob("descriptor", text))))
        return Layout(files, tuple(self.losses), found.references)

    def _parts(self) -> list[Part]:
        """Returns the extents for the descriptor."""
        kind = FLAT.get(self.options.subformat, "SPARSE")
        names = extent_names(self.options, self.name, self.sectors) or [self.name]
        longest = SPLIT_SECTORS if self.options.split else self.sectors
        return [
            Part("RW", min(longest, self.sectors - at), kind, name)
            for at, name in zip(range(0, self.sectors, longest), names, strict=True)
        ]

    def _sparse(self, window: Extents, size: int, descriptor: bytes | None) -> Extents:
        extent = SparseExtent(
            window,
            size,
            self.modulus,
            descriptor,
            self.carrier,
            delta=self.backing is not None,
            zeroed_grains=self.options.zeroed_grain,
        )
        return extent.file()

    # -- the descriptor

    def _embedded(self, text: bytes) -> bytes:
        room = DESCRIPTOR_SECTORS * structs.SECTOR
        if len(text) > room:
            raise PlanError(f"VMDK descriptor of {len(text)} bytes, {room} at most: its file names are too long")
        return text.ljust(room, b"\0")

    def _descriptor(self, parts: Sequence[Part], records: Sequence[Record] = ()) -> bytes:
        """Returns the descriptor, with a unique content id."""
        content = derived(self.placement.content_identity, "vmdk content")
        # 0, fffffffe and ffffffff have a meaning of their own.
        cid = int.from_bytes(content[:4], "big") % 0xFFFFFFFD + 1
        parent_cid = NO_PARENT
        if self.backing:
            found = content_id(self.image.parent) if self.image.parent else None
            if found is None:
                raise PlanError(f"CID of the parent {self.backing.reference} is not known: it was not read as a VMDK")
            parent_cid = found
        return render(
            create_type=self.options.create_type,
            cid=cid,
            parts=parts,
            database=self._database(f"{content[4:].hex()}{cid:08x}") | self._uuids() | recorded(records),
            parent_cid=parent_cid,
            parent=self.backing.reference if self.backing else None,
        )

    def _database(self, long_content_id: str) -> dict[str, str]:
        facts, options = self.image.facts, self.options
        adapter = options.adapter_type or self._adapter(facts.adapter_type)
        database = {"adapterType": adapter}
        geometry = facts.geometry
        if geometry is None:
            # As by VMware's own tools: 16 heads for IDE, else 255.
            heads = 16 if adapter == "ide" else 255
            geometry = Geometry(self.sectors // (heads * 63), heads, 63)
        database |= {f"geometry.{key}": str(value) for key, value in geometry._asdict().items()}
        database["longContentID"] = long_content_id
        database["toolsVersion"] = options.toolsversion
        if options.identity:
            # Without one, the first VMware product that uses the disk adds a UUID of its own form.
            digits = self.placement.identity.hex(" ")
            database["uuid"] = f"{digits[:23]}-{digits[24:]}"
        database["virtualHWVersion"] = options.hwversion
        return database

    def _uuids(self) -> dict[str, str]:
        """Returns the ids that VirtualBox compares with its settings, and a child's with those of its parent.

        A disk without a parent has zeros for it, as VirtualBox writes them.
        """
        identity = self.placement.identity
        own = (identity, derived(self.placement.content_identity, "vmdk modification"))
        parent: tuple[UUID | None, UUID | None] = (_NIL, _NIL)
        if self.backing and self.image.parent:
            parent = virtualbox_ids(self.image.parent)
        texts = dict(zip(("image", "modification"), (str(UUID(bytes=each)) for each in own), strict=True))
        for name, each in zip(("parent", "parentmodification"), parent, strict=True):
            if each is not None:
                texts[name] = str(each)
        return {f"uuid.{name}": text for name, text in texts.items()}

    def _adapter(self, wish: str | None) -> str:
        known = get_args(AdapterType)
        if wish is None or wish in known:
            return wish or "ide"
        self.losses.append(f"adapter type {wish}: VMDK knows {', '.join(known)}, ide is written")
        return "ide"
