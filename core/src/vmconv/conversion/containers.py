"""The images that a conversion makes: one flattened image, or with `chain` one image per layer.

They are laid out from the base upwards. Each is read back from its layout, before any file exists, because a child
takes its parent's identity from the parent's header.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vmconv.conversion.results import Results
from vmconv.errors import PlanError, PluginError, UsageError, in_words
from vmconv.interface.backend import Survey
from vmconv.interface.format import Format
from vmconv.io.registry import Registry
from vmconv.model.extents import Extents, Kind
from vmconv.model.facts import MINOR, MinorLoss
from vmconv.model.identity import derived, fresh
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement, Scratch
from vmconv.model.references import name_for, plain, refer
from vmconv.model.sources import Encryptor, File

_MOST_GAPS = 4
"""Chunks by which a file may be longer than its disk, so that its payload begins where chunks do."""
_METADATA = 1024
"""Bytes of a disk for one of metadata: a file may be longer by these too."""


class Target(NamedTuple):
    """The requested target: the file `name` in `directory`, its format and its writer's options.

    `encryptor` encrypts the image.

    `identity` comes from the options or is random. `content` is the identity of the content of an image that keeps its
    own; see `Placement`. `scratch` is room for what its writer makes.
    """

    format: Format
    options: Any
    directory: str
    name: str
    identity: bytes
    content: bytes | None = None
    scratch: Scratch | None = None
    encryptor: Encryptor | None = None

    @classmethod
    def of(cls, wanted: Format, options: Any, directory: str, name: str) -> Target:
        """Returns a target with its identity."""
        return cls(wanted, options, directory, name, getattr(options, "identity", None) or fresh())

    @property
    def has_identity(self) -> bool:
        """True if images of the format have ids."""
        return hasattr(self.options, "identity")

    def identity_of(self, layer: int) -> bytes:
        """Returns the identity of a layer's image; layer 0 is the user's target."""
        return derived(self.identity, f"layer {layer}") if layer else self.identity


def new_name(own: str, target: Format, registry: Registry) -> str:
    """Returns the file name `own` with the suffix of the target's format."""
    return registry.stem(own) + next(iter(target.suffixes), f".{target.name}")


class Kept(NamedTuple):
    """A layer of the source that becomes the backing file of the new images, and the reference to it."""

    image: Image
    backing: Backing


def keep_source(image: Image, registry: Registry, directory: str) -> Kept:
    """Returns the whole source as the backing file of an image in `directory`, with records of all its files.

    Raises `PlanError` if QEMU, the reader of such images, would not see the same disk in the source.
    """
    files: dict[int, File] = {}
    for layer in image.chain():
        why = registry.format(layer.format_name).qemu_incompatibility(layer)
        if why:
            raise PlanError(
                f"{layer.file.name}: cannot be a backing file: {why}",
                hint="a VMDK with subformat=reference names ranges of the source, if they are few",
            )
        files |= {id(file): file for file in (layer.file, *layer.guest.sources) if isinstance(file, File)}
    records = tuple(refer(file, directory) for file in files.values())
    return Kept(image, Backing(name_for(image.file, directory), image.format_name, records))


class Part(NamedTuple):
    """Layers of the source that become the image `name`: from `image` down to `base`, exclusive."""

    image: Image
    base: Image | None
    name: str


class Container(NamedTuple):
    """One image to make: `disk` is its guest-visible content, on top of `backing` if it has a parent.

    `identity` is the image's own, None if the format has no ids.
    """

    source: Image
    disk: Image
    format: Format
    name: str
    backing: Backing | None
    layout: Layout
    identity: bytes | None = None
    encryptor: Encryptor | None = None

    @property
    def below(self) -> Extents | None:
        """The table of the layers below."""
        return self.disk.parent.flat if self.backing and self.disk.parent else None

    def losses(self) -> Iterator[str]:
        """Yields properties of the source that this image cannot store."""
        yield from self.source.losses
        for name, value in self.source.facts.stated():
            # New ids replace the source's, so those are not lost.
            if name not in self.format.carries and not (name == "identity" and self.identity is not None):
                loss = f"{name.replace('_', ' ')} {in_words(value)}: {self.format.name} has no place for it"
                yield MinorLoss(loss) if name in MINOR else loss
        for name, content in self.source.state.items():
            if name not in self.format.carries_state:
                yield f"{name} ({len(content)} bytes): {self.format.name} has no place for it"
        if self.source.kind == "memory" and not self.format.keeps_holes:
            yield from _filled_holes(self.source, self.format)


def _filled_holes(image: Image, target: Format) -> Iterator[str]:
    """Yields the loss of addresses without RAM, for a format that has zeros there."""
    holes = image.guest.total(Kind.HOLE)
    if holes:
        yield f"{holes} bytes of addresses without RAM: {target.name} has zeros there"


def parts_of(image: Image, target: Target, registry: Registry, kept: Kept | None, *, chain: bool) -> list[Part]:
    """Returns the parts of the source that become images, the base first and the user's target last."""
    base = kept.image if kept else None
    if not chain:
        return [Part(image, base, target.name)]
    parts: list[Part] = []
    taken: set[str] = set()
    above = image
    for layer in image.chain():
        if layer is base:
            break
        name = target.name if layer is image else _name(layer, above, target.format, registry, taken)
        taken.add(name)
        parts.append(Part(layer, layer.parent, name))
        above = layer
    if len(parts) > 1 and not target.format.supports_backing:
        raise UsageError(
            f"{target.format.name} cannot have a backing file",
            hint=f"{image.file.name} has {len(parts)} layers: without --chain all become one image",
        )
    return parts[::-1]


def _name(layer: Image, above: Image, target: Format, registry: Registry, taken: set[str]) -> str:
    """Returns a layer's file name with the target's suffix, and with a number if that is taken."""
    own = layer.file.name
    if layer.file is above.file and above.parent_reference:
        # Some formats describe a whole chain in one file, so its name fits no single layer.
        own = os.path.basename(above.parent_reference)
    name, number = new_name(own, target, registry), 1
    while name in taken:
        number += 1
        name = new_name(f"{registry.stem(own)}-{number}", target, registry)
    return name


def lay_out(
    parts: Sequence[Part],
    target: Target,
    survey: Survey,
    registry: Registry,
    kept: Kept | None,
    carrier: File | None = None,
) -> list[Container]:
    """Returns the containers of the parts, in their order. Raises `PlanError` if the format cannot hold the disk.

    In place, `carrier` is the file that becomes the only container.
    """
    made: list[Container] = []
    parent, backing = kept or (None, None)
    # Parts begin with the base; layers are numbered from the user's target, 0, downwards.
    for layer, part in zip(reversed(range(len(parts))), parts, strict=True):
        disk = part.image.onto(part.base, parent) if part.base and backing else part.image
        placement = Placement(
            survey.unit,
            part.name,
            target.directory,
            carrier,
            target.identity_of(layer),
            target.content,
            target.scratch,
            target.encryptor,
        )
        layout = _laid_out(disk, target, placement, backing, survey.chunk)
        identity = placement.identity if target.has_identity else None
        made.append(Container(part.image, disk, target.format, part.name, backing, layout, identity, target.encryptor))
        if part is not parts[-1]:
            parent, backing = _as_parent(made[-1], target, registry), Backing(plain(part.name), target.format.name)
    return made


def _laid_out(disk: Image, target: Target, placement: Placement, backing: Backing | None, chunk: int) -> Layout:
    """Returns the layout that the format's writer makes: by chunks if that leaves few gaps."""
    if chunk > placement.modulus:
        layout = _written(disk, target, placement._replace(modulus=chunk), backing)
        if sum(out.table.size for out in layout.files) <= disk.size + _MOST_GAPS * chunk + disk.size // _METADATA:
            return layout
    return _written(disk, target, placement, backing)


def _written(disk: Image, target: Target, placement: Placement, backing: Backing | None) -> Layout:
    layout: Any = target.format.write(disk, target.options, placement, backing=backing)
    # Writers are plugins: a wrong result must name its plugin, not fail somewhere else.
    if not isinstance(layout, Layout):
        said = f"its writer returns {type(layout).__name__}, which is no Layout"
        raise PluginError(said, format_name=target.format.name)
    return layout


def _as_parent(container: Container, target: Target, registry: Registry) -> Image:
    """Returns a planned image as the parent of the next, with the metadata of its own planned header.

    Its table points to the source's payload, because a child shares from the source and not from the new parent.
    """
    from vmconv.model.planned import PlannedFile

    file = PlannedFile(os.path.join(target.directory, container.name), container.layout.files[-1].table)
    header = container.format.read(file, Results(registry, container.layout.references))
    return Image(
        container.format.name,
        file,
        header.size,
        lambda: container.disk.flat.window(0, header.size).without_holes(),
        facts=header.facts,
        details=lambda: header.details,
    )
