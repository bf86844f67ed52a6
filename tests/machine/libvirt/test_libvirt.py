"""The libvirt plugin."""

from __future__ import annotations

from vmconv.testing import MachineTests
from vmconv_libvirt import Libvirt


class TestLibvirt(MachineTests):
    format = Libvirt()
