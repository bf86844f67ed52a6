"""Core with one plugin, or with none: what is installed works, what is missing is named.

`test_wheels.py` runs these tests in environments with one plugin. `VMCONV_ALONE` names the plugin, or `core`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import vmconv
from vmconv.cli.main import main
from vmconv.errors import UsageError
from vmconv.io.known import KNOWN
from vmconv.io.registry import installed, installed_machines
from vmconv.model.image import Image
from vmconv.model.layout import Placement
from vmconv.testing import make_in_memory, patterned
from vmconv.testing.disks import raw_disk

ALONE = os.environ["VMCONV_ALONE"]
NEEDED = set() if ALONE == "core" else set(re.findall(r"vmconv-\w+", " ".join(requires(f"vmconv-{ALONE}") or ())))
"""Plugins that this one needs."""
FORMATS = {known.name: known.distribution for known in KNOWN if known.distribution and known.kind == "disk"}
"""The distribution of each disk format."""
OWN = {name for name, distribution in FORMATS.items() if distribution == f"vmconv-{ALONE}"}
MEMORY = {known.name for known in KNOWN if known.kind == "memory" and known.distribution == f"vmconv-{ALONE}"}


def test_only_that_plugin_is_installed() -> None:
    registries = (installed(), installed_machines())
    assert [registry.problems for registry in registries] == [[], []]
    found = {plugin.distribution for registry in registries for plugin in registry.plugins}
    assert found - {"vmconv"} == ({f"vmconv-{ALONE}"} | NEEDED) - {"vmconv-core"}
    assert set(installed().formats) == OWN
    assert set(installed().memory_formats) == MEMORY


def test_its_commands_start() -> None:
    distribution = "vmconv" if ALONE == "core" else f"vmconv-{ALONE}"
    own = [name for (kind, name), owner in installed().owners.items() if (kind, owner) == ("command", distribution)]
    for command in ([], *([name] for name in own)):
        subprocess.run([sys.executable, "-m", "vmconv", *command, "--help"], check=True, capture_output=True)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - OWN))
def test_a_format_that_is_not_installed_is_named_with_its_distribution(name: str, tmp_path: Path) -> None:
    disk = tmp_path / f"disk.{name}"
    disk.write_bytes(bytes(4096))
    with pytest.raises(UsageError, match="is not installed") as caught:
        vmconv.info(str(disk), format_name=name)
    assert caught.value.hint == f"pip install {FORMATS[name]}"


def test_formats_lists_what_could_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    listed = capsys.readouterr().out
    assert all((f"pip install {FORMATS[name]} " in listed) == (name not in OWN) for name in FORMATS)


@pytest.mark.skipif(
    ALONE not in installed().formats or not installed().formats[ALONE].can_write, reason="the plugin writes no disks"
)
def test_a_conversion_between_images_of_the_one_format_works(tmp_path: Path) -> None:
    one = installed().formats[ALONE]
    image: Image = raw_disk(patterned(1 << 20, [(4096, 65536)]))
    _, files = make_in_memory(one.write(image, one.options()(), Placement(512)), image)
    source, target = (tmp_path / f"{letter}{one.suffixes[0]}" for letter in "ab")
    source.write_bytes(files[-1].read(0, files[-1].size))
    vmconv.convert(str(source), str(target))
    assert vmconv.compare(str(source), str(target))
