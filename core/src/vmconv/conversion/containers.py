"""The images that a conversion makes: one of all layers of the source, or with a kept chain one of each.

They are laid out from the base upwards. Each is read back from its layout, before anything is made, so that the next
one finds the identity of its new parent as any image does: in the parent's header.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vmconv.conversion.results import Results
from vmconv.errors import PlanError, PluginError, UsageError, in_words
from vmconv.interface.format import Format
from vmconv.io.registry import Registry
from vmconv.model.extents import Extents
from vmconv.model.identity import derived, fresh
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Layout, Placement
from vmconv.model.references import name_for, plain, refer
from vmconv.model.sources import File


class Target(NamedTuple):
    """What the user asked for: the file `name` in `directory`, in this format, written with these options.

    `identity` is that of its image, as the options give it or random.
    """

    format: Format
    options: Any
    directory: str
    name: str
    identity: bytes

    @classmethod
    def of(cls, wanted: Format, options: Any, directory: str, name: str) -> Target:
        """Returns a target with its identity."""
        return cls(wanted, options, directory, name, getattr(options, "identity", None) or fresh())

    @property
    def has_identity(self) -> bool:
        """True when images of the format have ids."""
        return hasattr(self.options, "identity")

    def identity_of(self, layer: int) -> bytes:
        """Returns the identity of the image of a layer; 0 is the one that the user named."""
        return derived(self.identity, f"layer {layer}") if layer else self.identity


def new_name(own: str, target: Format, registry: Registry) -> str:
    """Returns the name of a file that an image of this name becomes in the target's format."""
    return registry.stem(own) + next(iter(target.suffixes), f".{target.name}")


class Kept(NamedTuple):
    """A layer of the source that stays as it is, below all that is made, and how the image above it names it."""

    image: Image
    backing: Backing


def keep_source(image: Image, registry: Registry, directory: str) -> Kept:
    """Returns all of the source as what is kept below an image in `directory`, with records of all its files.

    Raises `PlanError` when QEMU, for which such images are made, would see another disk in it or none.
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
    """Layers of the source that become one image, the file `name`: those of `image` down to, and without, `base`."""

    image: Image
    base: Image | None
    name: str


class Container(NamedTuple):
    """One image that will be made: `disk` is what it holds for a guest, on top of `backing` when it has a parent.

    `has_identity`: images of the format have ids, and this one has new ones.
    """

    source: Image
    disk: Image
    format: Format
    name: str
    backing: Backing | None
    layout: Layout
    has_identity: bool = False

    @property
    def below(self) -> Extents | None:
        """The table of what lies below."""
        return self.disk.parent.flat if self.backing and self.disk.parent else None

    def losses(self) -> Iterator[str]:
        """Yields what the source states or holds and this image cannot say."""
        yield from self.source.losses
        for name, value in self.source.metadata.items():
            if name not in self.format.carries and value is not None and not (name == "identity" and self.has_identity):
                yield f"{name.replace('_', ' ')} {in_words(value)}: {self.format.name} has no place for it"


def parts_of(image: Image, target: Target, registry: Registry, kept: Kept | None, *, chain: bool) -> list[Part]:
    """Returns the parts of the source that become images, the base first; the last is what the user named."""
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
    """Returns the name of a layer's new file: its own with another suffix, and a number if it is taken."""
    own = layer.file.name
    if layer.file is above.file and above.parent_reference:
        # Some formats describe a whole chain in one file.
        own = os.path.basename(above.parent_reference)
    name, number = new_name(own, target, registry), 1
    while name in taken:
        number += 1
        name = new_name(f"{registry.stem(own)}-{number}", target, registry)
    return name


def lay_out(
    parts: Sequence[Part],
    target: Target,
    modulus: int,
    registry: Registry,
    kept: Kept | None,
    carrier: File | None = None,
) -> list[Container]:
    """Returns the containers of the parts, in their order; raises `PlanError` for what the format cannot hold.

    In place, `carrier` is the file that becomes the only one.
    """
    made: list[Container] = []
    parent, backing = kept or (None, None)
    for layer, part in zip(reversed(range(len(parts))), parts, strict=True):
        disk = part.image.onto(part.base, parent) if part.base and backing else part.image
        placement = Placement(modulus, part.name, target.directory, carrier, target.identity_of(layer))
        layout: Any = target.format.write(disk, target.options, placement, backing=backing)
        if not isinstance(layout, Layout):
            said = f"its writer returns {type(layout).__name__}, which is no Layout"
            raise PluginError(said, format_name=target.format.name)
        made.append(Container(part.image, disk, target.format, part.name, backing, layout, target.has_identity))
        if part is not parts[-1]:
            parent, backing = _as_parent(made[-1], target, registry), Backing(plain(part.name), target.format.name)
    return made


def _as_parent(container: Container, target: Target, registry: Registry) -> Image:
    """Returns the image that will be made as the parent of the next: it states what its own header says of it.

    Its table leads to the source's payload, which is where a child that needs some of it should share it from.
    """
    from vmconv.model.planned import PlannedFile

    file = PlannedFile(os.path.join(target.directory, container.name), container.layout.files[-1].table)
    header = container.format.read(file, Results(registry, container.layout.references))
    return Image(
        container.format.name,
        file,
        header.size,
        lambda: container.disk.flat.window(0, header.size).without_holes(),
        metadata=header.metadata,
        details=lambda: header.details,
    )
