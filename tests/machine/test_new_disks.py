"""The disks of a new machine: the ids that the configuration states are in the images."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import vmconv
from support.toy_machines import machine
from vmconv.cli.machine.report import plan_lines
from vmconv.errors import ImageError

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


def test_a_plan_says_what_is_read_for_the_digests_of_a_package(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    payload = sum(disk.totals.shared + disk.totals.copied for disk in vmconv.machine_plan(config, "web.ova").disks)
    for manifest, expected in (("none", 0), ("sha256", payload)):
        plan = vmconv.machine_plan(config, tmp_path / "web.ova", options={"manifest": manifest})
        assert plan.digested == expected
        said = [line for line in plan_lines(plan) if line.startswith("read for the digests of the manifest")]
        assert len(said) == bool(expected)


def test_a_certificate_does_not_sign_the_new_machine(tmp_path: Path) -> None:
    config = machine(tmp_path / "old")
    result = vmconv.machine_convert(config, tmp_path / "ovf", target_format="ovf")
    name = Path(result.target).name
    digest = hashlib.sha256((tmp_path / "ovf" / name).read_bytes()).hexdigest()
    (tmp_path / "ovf/web.mf").write_text(f"SHA256({name})= {digest}\n")
    assert "certificate" not in {loss.path for loss in vmconv.machine_plan(result.target, tmp_path / "web.ova").losses}
    (tmp_path / "ovf/web.cert").write_text("-")
    losses = vmconv.machine_plan(result.target, tmp_path / "web.ova").losses
    assert ("certificate", "web.cert") in {(loss.path, loss.value) for loss in losses}
    (tmp_path / "ovf/web.mf").write_text(f"SHA256({name})= {'0' * 64}\n")
    with pytest.raises(ImageError, match="sha256 of the descriptor"):
        vmconv.machine_plan(result.target, tmp_path / "web.ova")
