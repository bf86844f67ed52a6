"""Every format of memory to every other one, as the registry has them: what is shared, and where RAM is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vmconv
from support import memory_images as images
from support.mounting import mounted
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind

FORMATS = sorted(installed().memory_formats)
TARGETS = [name for name in FORMATS if installed().format(name).can_write]
COPIED = {"lime": 2 * images.PAGE}
"""Bytes that are copied: in each of two ranges the page that holds the small ranges in front of the payload."""


def suffix(name: str) -> str:
    return installed().format(name).suffixes[0]


def make(name: str, folder: Path) -> Path:
    """Returns the image of a small machine in a format, with its payload in whole blocks."""
    memory = images.ram()
    state = images.make_vmware(folder, memory)
    if name == "vmem":
        return state
    if name in images.MAKERS:
        return images.MAKERS[name](folder, memory)
    path = folder / f"made{suffix(name)}"
    vmconv.convert(str(state), str(path))
    return path


def expected(source: str) -> bytes:
    """Returns the bytes at all addresses. Machines of QEMU's formats have no gap there: it follows from their size."""
    return images.ram() if source in images.GAPLESS else images.physical(images.ram())


@pytest.mark.parametrize("source", FORMATS)
def test_memory_converts_to_every_other_format(reflink_dir: Path, source: str) -> None:
    path = make(source, reflink_dir)
    decoded = source in images.DECODED
    for target in TARGETS:
        folder = reflink_dir / "target"
        folder.mkdir()
        made = folder / f"new{suffix(target)}"
        strict = not (decoded or COPIED.get(target) or COPIED.get(source))
        result = vmconv.convert(str(path), str(made), zero_copy="require" if strict else "auto")
        assert vmconv.compare(str(path), str(made))
        if not decoded:
            assert result.totals.copied <= max(COPIED.get(target, 0), COPIED.get(source, 0)), target
        if strict:
            assert vmconv.prove(str(path), str(made))
        assert read(made) == expected(source)
        if installed().format(target).keeps_holes and source not in ("ram", *images.GAPLESS):
            assert holes(made) == [(images.LOW, images.GAP)]
        assert "holes" not in " ".join(result.losses) or not installed().format(target).keeps_holes
        for part in folder.iterdir():
            part.unlink()
        folder.rmdir()


def read(path: Path) -> bytes:
    with Opener(installed()) as opener:
        table = opener.image(str(path)).guest
        return table.read(0, table.size)


def holes(path: Path) -> list[tuple[int, int]]:
    with Opener(installed()) as opener:
        return [(row.start, row.end) for row in opener.image(str(path)).guest if row.kind == Kind.HOLE]


def test_all_pairs_are_tried() -> None:
    assert set(TARGETS) >= {"ram", "elfcore", "lime", "vmem"}
    assert set(FORMATS) - set(TARGETS) <= set(images.MAKERS)


@pytest.mark.parametrize("source", FORMATS)
def test_a_mount_shows_memory_in_every_format_of_memory_and_in_no_other(
    xfs_dir: Path, tmp_path: Path, source: str
) -> None:
    path = make(source, xfs_dir)
    point = tmp_path / "point"
    point.mkdir()
    with mounted(xfs_dir, point):
        assert sorted(os.listdir(point / path.name)) == TARGETS
        shown = point / path.name / "ram" / f"{path.stem}.ram"
        assert shown.read_bytes() == expected(source)
        made = tmp_path / "again"
        made.mkdir()
        for target in TARGETS:
            for part in (point / path.name / target).iterdir():
                (made / part.name).write_bytes(part.read_bytes())
            assert read(made / f"{path.stem}{suffix(target)}") == expected(source)
