"""The conformance tests of ids: UUIDs, GUIDs, content ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from vmconv.conversion.results import Results
from vmconv.errors import ImageError, PlanError
from vmconv.interface.format import Format
from vmconv.io.registry import Registry
from vmconv.model.extents import Extents, Kind
from vmconv.model.identity import derived
from vmconv.model.image import Image
from vmconv.model.layout import Backing, Placement
from vmconv.model.options import parse_options
from vmconv.testing.disks import disk_of, make_in_memory, patterned, raw_disk
from vmconv.testing.memory import MemoryFile

_MIB = 1 << 20
_ONE, _OTHER = (derived(b"kit", label) for label in ("one", "other"))

Files = Mapping[str, MemoryFile]


class IdentityTests:
    """The part of `FormatTests` on `Placement.identity`."""

    format: ClassVar[Format]
    variants: ClassVar[Sequence[Mapping[str, str]]] = ({},)
    ids: ClassVar[Sequence[str]] = ()
    """Fields that are unique to each image: "identity", or names of format-specific details."""

    def made(
        self, image: Image, variant: Mapping[str, str], identity: bytes, name: str, backing: Backing | None = None
    ) -> Files:
        """Returns the files of an image of this disk by name; the image itself comes last."""
        options = parse_options(self.format.options(), variant, self.format.name)
        layout = self.format.write(image, options, Placement(512, name, identity=identity), backing=backing)
        _, files = make_in_memory(layout, image, name)
        return {out.name or name: file for out, file in zip(layout.files, files, strict=True)}

    def opened(self, *images: Files) -> Image:
        """Returns the last of these images, opened with the files of all."""
        results = Results(Registry({self.format.name: self.format}))
        for image in images:
            for name, file in image.items():
                results.add(name, file, self.format)
        return self.format.read(list(images[-1].values())[-1], results)

    def ids_of(self, image: Image) -> list[Any]:
        stated = {**image.details.get("format-specific", {}).get("data", {}), **dict(image.facts.stated())}
        return [stated[name] for name in self.ids]

    def test_a_format_takes_an_identity_if_its_images_have_ids(self) -> None:
        assert hasattr(self.format.options()(), "identity") == bool(self.ids)

    def test_two_images_of_one_layout_have_different_ids(self) -> None:
        disks = [raw_disk(patterned(3 * _MIB, [(_MIB, 70000)], seed=seed)) for seed in (1, 2)]
        for variant in self.variants:
            one, other = (
                self.ids_of(self.opened(self.made(disk, variant, identity, "disk")))
                for disk, identity in zip(disks, (_ONE, _OTHER), strict=True)
            )
            assert all(a != b for a, b in zip(one, other, strict=True)), (variant, one, other)
            assert len({str(value) for value in one}) == len(self.ids), (variant, one)

    def test_the_same_identity_gives_the_same_bytes(self) -> None:
        disk = raw_disk(patterned(3 * _MIB, [(0, 4096), (_MIB, 70000)]))
        for variant in self.variants:
            one, again, other = (
                {name: file.read(0, file.size) for name, file in self.made(disk, variant, identity, "disk").items()}
                for identity in (_ONE, _ONE, _OTHER)
            )
            assert one == again, variant
            assert (one == other) == (not self.ids), variant

    def test_a_layer_on_an_exchanged_parent_is_refused(self) -> None:
        if not (self.format.supports_backing and self.ids):
            pytest.skip("layers of this format do not state the id of their parent")
        name = f"base{self.format.suffixes[0]}"
        bases = [raw_disk(patterned(3 * _MIB, [(0, 3 * _MIB)], seed=seed)) for seed in (1, 2)]
        own, exchanged = (
            self.made(base, self.variants[0], identity, name)
            for base, identity in zip(bases, (_ONE, _OTHER), strict=True)
        )
        source = patterned(3 * _MIB, [(0, 3 * _MIB)], seed=3)
        table = Extents.of([(0, Kind.DATA, source, 0), (_MIB, Kind.HOLE, None, 0)], 3 * _MIB)
        tried = 0
        for variant in self.variants:
            layer = disk_of(table, source, parent=self.opened(own))
            try:
                top = self.made(layer, variant, derived(_ONE, "top"), "top", Backing(name, self.format.name))
            except PlanError:
                # Some variants have no parents, such as flat ones.
                continue
            tried += 1
            assert self.opened(own, top).parent is not None
            with pytest.raises(ImageError) as caught:
                _ = self.opened(exchanged, top).flat
            assert "\n" not in str(caught.value)
            assert caught.value.hint
        assert tried
