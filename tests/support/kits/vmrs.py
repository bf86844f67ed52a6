"""The conformance kit of Hyper-V's saved states."""

from __future__ import annotations

from collections.abc import Mapping

from support.hyperv_storage import PAGE, seal
from support.memory_images import MIB, saved_by_hyperv
from vmconv.testing import MemoryReaderTests, Sample, random_bytes
from vmconv_vmrs import Vmrs


class VmrsKit(MemoryReaderTests):
    format = Vmrs()

    def sound(self, variant: Mapping[str, str]) -> Sample:
        data = saved_by_hyperv([(0, random_bytes(MIB, 1)), (4 * MIB, random_bytes(3 * PAGE, 2))])
        return Sample(
            data,
            [
                (0, 64),
                (PAGE, PAGE + 64),
                (2 * PAGE, 2 * PAGE + 200),
                (3 * PAGE, 3 * PAGE + 64),
                *((at, at + 512) for at in range(4 * PAGE, 10 * PAGE, PAGE)),
            ],
        )

    def seal(self, image: bytearray) -> None:
        seal(image)
