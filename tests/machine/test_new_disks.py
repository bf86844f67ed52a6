"""The disks of a new machine: the ids that the configuration states are in the images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vmconv
from support.toy_machines import machine

pytestmark = pytest.mark.usefixtures("toys")


def test_vmdks_of_virtualbox_have_the_ids_of_its_settings(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    result = vmconv.machine_convert(config, tmp_path / "new", target_format="vbox", disk_format="vmdk")
    disks = vmconv.machine_info(result.target).disks
    assert len({disk.image_uuid for disk in disks}) == 3
    for disk in disks:
        assert disk.format == "vmdk"
        assert disk.file
        stated = re.findall(rb'ddb\.uuid\.image = "(.*)"', (tmp_path / "new" / disk.file).read_bytes())
        assert stated == [str(disk.image_uuid).encode()]
