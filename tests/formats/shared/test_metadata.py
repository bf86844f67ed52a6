"""What an image says of its disk besides the bytes: carried wherever the target can say it, named as lost elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB
from support.kits import kit as kit_of
from support.variants import Variant, options, self_contained, title
from vmconv.cli.main import main
from vmconv.errors import PlanError
from vmconv.io.registry import installed
from vmconv.model.extents import Extents
from vmconv.model.facts import DiskFacts
from vmconv.model.layout import Layout, Placement
from vmconv.model.options import parse_options
from vmconv.testing import disk_of, make_in_memory, patterned
from vmconv.testing.disks import raw_disk
from vmconv.testing.memory import MemoryFile

NAMES = sorted(name for name, one in installed().formats.items() if one.can_write)


def stated(name: str) -> DiskFacts:
    """Returns a value for each fact that the format carries."""
    return kit_of(name).facts


def image_with_metadata(name: str, path: Path) -> Path:
    """Writes an image that says all that its format can."""
    one = installed().formats[name]
    disk = raw_disk(patterned(8 * MIB, [(0, MIB)]), stated(name))
    _, files = make_in_memory(one.write(disk, one.options()(), Placement(512, path.name)), disk)
    path.write_bytes(files[-1].read(0, files[-1].size))
    return path


def described(path: Path, name: str) -> dict[str, Any]:
    """Returns what an image says of its disk, apart from what every disk has."""
    disk = vmconv.info(str(path), format_name=name)["disk"]
    return {field: value for field, value in disk.items() if value is not None and field not in ("size", "parent")}


@pytest.mark.parametrize("name", [name for name in NAMES if installed().formats[name].carries])
def test_each_field_comes_back_or_is_named_as_lost(xfs_dir: Path, name: str) -> None:
    image = image_with_metadata(name, xfs_dir / f"image{installed().formats[name].suffixes[0]}")
    before = described(image, name)
    fields = [field for field, _ in stated(name).stated()]
    assert set(fields) <= set(before)
    for target in self_contained():
        folder = xfs_dir / title(target)
        folder.mkdir()
        path = folder / f"new{installed().formats[target[0]].suffixes[0]}"
        arguments: dict[str, Any] = {"source_format": name, "target_format": target[0], "options": options(target)}
        planned = vmconv.plan(str(image), str(path), **arguments)
        result = vmconv.convert(str(image), str(path), **arguments)
        assert result.losses == planned.losses, target
        after = described(path, target[0])
        for field in fields:
            kept = after.get(field) == before[field]
            named = any(loss.startswith(field.replace("_", " ")) for loss in result.losses)
            assert kept != named, (target, field, after.get(field), result.losses)
            # A field that the format carries is lost only where it cannot hold this value.
            assert kept or field not in installed().formats[target[0]].carries or "creator" in field, (target, field)


@pytest.mark.of_format("vhdx")
def test_losses_are_in_what_plan_and_convert_print(xfs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, target = image_with_metadata("vhdx", xfs_dir / "disk.vhdx"), str(xfs_dir / "new.raw")
    said = "logical sector size 4096: raw has no place for it"
    assert main(["plan", str(image), target]) == 0
    assert said in capsys.readouterr().out
    assert main(["plan", "--output", "json", str(image), target]) == 0
    assert said in json.loads(capsys.readouterr().out)["losses"]
    assert main(["convert", str(image), target]) == 0
    assert said in "".join(capsys.readouterr())


# -- sizes


def planned(variant: Variant, size: int) -> Layout:
    one = installed().formats[variant[0]]
    disk = disk_of(Extents.filled(size), MemoryFile("source", 0))
    return one.write(disk, parse_options(one.options(), options(variant), one.name), Placement(4096, "disk.img"))


def limited() -> list[Variant]:
    """Returns the formats and subformats that not every disk fits into: a raw disk has no tables.

    The largest split disk is the largest of its format, in 32768 files, which take a minute to lay out.
    """
    return [variant for variant in self_contained() if variant[0] != "raw" and "twoGb" not in variant[1]]


@pytest.mark.parametrize("variant", limited(), ids=title)
def test_a_disk_that_is_too_large_is_refused_with_the_largest_size(variant: Variant) -> None:
    with pytest.raises(PlanError) as caught:
        planned(variant, 1 << 61)
    numbers = [int(text) for text in re.findall(r"\d{4,}", f"{caught.value} {caught.value.hint}")]
    (most,) = {number for number in numbers if number < 1 << 61 and fits(variant, number) > fits(variant, number + 512)}
    assert most > 1 << 40


def fits(variant: Variant, size: int) -> bool:
    try:
        planned(variant, size)
    except PlanError:
        return False
    return True
