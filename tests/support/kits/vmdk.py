"""The conformance kit of VMDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from support.disks import MIB
from vmconv.io.registry import Registry
from vmconv.model.facts import DiskFacts, Geometry
from vmconv.model.image import Image
from vmconv.model.sources import File
from vmconv.testing import FormatTests, image_file, make_in_memory, patterned
from vmconv.testing.disks import raw_disk
from vmconv.testing.reading import Siblings
from vmconv_vmdk import Vmdk

GRAIN = 65536

SPARSE: tuple[dict[str, str], ...] = (
    {},
    {"subformat": "twoGbMaxExtentSparse"},
    {"zeroed_grain": "on", "hwversion": "17", "toolsversion": "0"},
)

FLAT: tuple[dict[str, str], ...] = (
    {"subformat": "monolithicFlat"},
    {"subformat": "twoGbMaxExtentFlat"},
    {"subformat": "vmfs"},
)

STREAM = {"subformat": "streamOptimized"}

REFERENCE = {"subformat": "reference"}


class VmdkKit(FormatTests):
    format = Vmdk()
    sizes_differ = False
    variants = (*SPARSE, *FLAT, STREAM, REFERENCE)
    wrong_options = (
        {"subformat": "monolithic"},
        {"adapter_type": "virtio"},
        {"hwversion": "seven"},
        {"toolsversion": "-1"},
        {"subformat": "vmfs", "zeroed_grain": "on"},
        {"subformat": "streamOptimized", "zeroed_grain": "on"},
        {"subformat": "reference", "zeroed_grain": "on"},
        {"zeroed_grain": "perhaps"},
    )
    facts: ClassVar[DiskFacts] = DiskFacts(
        geometry=Geometry(cylinders=1000, heads=8, sectors=32), adapter_type="lsilogic"
    )
    ids = ("cid", "long-content-id")
    block = GRAIN
    siblings: ClassVar[Mapping[str, File]] = {}

    def sample(self, variant: Mapping[str, str]) -> bytes:
        """As the kit's, but remembers the extents; whole words, as the kit flips bits in words."""
        source = patterned(3 * MIB, [(0, 4096), (MIB, 70000), (3 * MIB - 8192, 8192)])
        image = raw_disk(source)
        layout = self.write(image, variant)
        _, files = make_in_memory(layout, image)
        siblings: dict[str, File] = {out.name: f for out, f in zip(layout.files, files, strict=True) if out.name}
        type(self).siblings = siblings | {reference.name: reference.file for reference in layout.references}
        data = files[-1].read(0, files[-1].size)
        return data.ljust(-(-len(data) // 8) * 8, b"\n")

    def open_sample(self, data: bytes) -> Image:
        return self.format.read(image_file(data), Siblings(Registry({"vmdk": self.format}), self.siblings))
