"""VMX: the conformance kit."""

from __future__ import annotations

from vmconv.testing import MachineTests
from vmconv_vmx import Vmx


class TestVmx(MachineTests):
    format = Vmx()
