"""The conformance kit of each format of memory."""

from __future__ import annotations

from support.kits.avml import AvmlKit
from support.kits.elfcore import ElfcoreKit
from support.kits.kdump import KdumpKit
from support.kits.libvirtsave import LibvirtsaveKit
from support.kits.lime import LimeKit
from support.kits.qevm import QevmKit
from support.kits.ram import RamKit
from support.kits.vmem import VmemKit
from support.kits.vmrs import VmrsKit


class TestRam(RamKit):
    """Raw memory."""


class TestElfcore(ElfcoreKit):
    """ELF cores."""


class TestLime(LimeKit):
    """LiME."""


class TestAvml(AvmlKit):
    """AVML."""


class TestVmem(VmemKit):
    """VMware."""


class TestKdump(KdumpKit):
    """kdump."""


class TestQevm(QevmKit):
    """QEMU's migration streams."""


class TestLibvirtsave(LibvirtsaveKit):
    """libvirt's saved machines."""


class TestVmrs(VmrsKit):
    """Hyper-V's saved states."""
