"""The conformance kit of libvirt's saved machines."""

from __future__ import annotations

from collections.abc import Mapping

from support.kits.qevm import MEMORY
from support.memory_images import libvirt_header, migration
from vmconv.testing import MemoryReaderTests, Sample
from vmconv_memory import LibvirtSave


class LibvirtsaveKit(MemoryReaderTests):
    format = LibvirtSave()

    def sound(self, variant: Mapping[str, str]) -> Sample:
        head = libvirt_header()
        return Sample(head + migration(MEMORY), [(0, 48), (len(head), len(head) + 160)])
