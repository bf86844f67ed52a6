"""Core with one plugin, or with none: what is there works, what is not is named. Run by tox in such environments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vmconv
from vmconv.cli.main import main
from vmconv.errors import UsageError
from vmconv.io.registry import installed

ALONE = os.environ.get("VMCONV_ALONE", "")

pytestmark = pytest.mark.skipif(not ALONE, reason="for environments with one plugin: tox sets VMCONV_ALONE")

PLUGINS = {"parallels", "qcow2", "qed", "raw", "vdi", "vhd", "vhdx", "vmdk"}


def test_only_that_format_is_installed() -> None:
    assert set(installed().formats) == {ALONE} - {"core"}
    assert installed().problems == []


@pytest.mark.parametrize("name", sorted(PLUGINS - {ALONE}))
def test_a_format_that_is_not_installed_is_named_with_its_distribution(name: str, tmp_path: Path) -> None:
    disk = tmp_path / f"disk.{name}"
    disk.write_bytes(bytes(4096))
    with pytest.raises(UsageError, match="is not installed") as caught:
        vmconv.info(str(disk), format_name=name)
    assert caught.value.hint == f"pip install vmconv-{name}"


def test_formats_lists_what_could_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    listed = capsys.readouterr().out
    assert all((f"pip install vmconv-{name} " in listed) == (name != ALONE) for name in PLUGINS)


def test_a_conversion_between_images_of_the_one_format_works(tmp_path: Path) -> None:
    if ALONE == "core":
        pytest.skip("core alone has no formats")
    from vmconv.model.image import Image
    from vmconv.model.layout import Placement
    from vmconv.testing import make_in_memory, patterned
    from vmconv.testing.disks import raw_disk

    one = installed().formats[ALONE]
    image: Image = raw_disk(patterned(1 << 20, [(4096, 65536)]))
    _, files = make_in_memory(one.write(image, one.options()(), Placement(512)), image)
    source, target = (tmp_path / f"{letter}{one.suffixes[0]}" for letter in "ab")
    source.write_bytes(files[-1].read(0, files[-1].size))
    vmconv.convert(str(source), str(target))
    assert vmconv.compare(str(source), str(target))
