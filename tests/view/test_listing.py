"""A mount lists the files of an image without planning them, and shows the formats that were asked for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from support.disks import MIB, make_disk
from support.mounting import ERRORS, mounted
from vmconv.api import views, volumes
from vmconv.cli.main import main
from vmconv.interface.format import Format
from vmconv.io.registry import installed
from vmconv_view import entry as entry_module
from vmconv_view.tree import Tree


def walked(tree: Tree, path: str = "") -> list[str]:
    """Returns what `find -type f` prints: it asks for attributes only where it does not know the type."""
    found = []
    node = tree.node(path)
    for name in node.names():
        below = f"{path}/{name}".strip("/")
        if node.has_files or tree.node(below).view:
            found.append(below)
        else:
            found += walked(tree, below)
    return found


def test_a_disk_without_partitions_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    looked: list[Any] = []

    def noted(image: Any) -> Any:
        looked.append(image)
        return volumes(image)

    monkeypatch.setattr(entry_module, "volumes", noted)
    tree = Tree(installed(), str(tmp_path))
    try:
        for _ in range(3):
            assert list(tree.node("disk.raw/partitions").names()) == []
    finally:
        tree.close()
    assert len(looked) == 1


def test_what_is_listed_is_planned_only_when_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large.raw"
    with large.open("wb") as file:
        file.truncate(5 << 30)
        file.write(b"payload")
    planned: list[str] = []

    def noted(image: Any, target: Format, *arguments: Any) -> Any:
        planned.append(target.name)
        return views(image, target, *arguments)

    monkeypatch.setattr(entry_module, "views", noted)
    tree = Tree(installed(), str(tmp_path))
    try:
        listed = walked(tree)
        assert planned == []
        assert sum("twoGbMaxExtentFlat/" in path for path in listed) == 4
        for path in listed:
            assert tree.node(path).view, path
        assert len(planned) > 10
        assert walked(tree) == listed
    finally:
        tree.close()


def test_a_file_that_cannot_be_made_says_where_the_reason_is(tmp_path: Path, point: Path) -> None:
    # VHD ends at 2040 GiB.
    with (tmp_path / "huge.raw").open("wb") as file:
        file.truncate(3 << 40)
    with mounted(tmp_path, point) as running:
        place = point / "huge.raw" / "vhd"
        assert os.listdir(place) == ["huge.vhd"]
        with pytest.raises(OSError, match="Input/output error") as caught:
            (place / "huge.vhd").stat()
        assert caught.value.errno == errno.EIO
        assert os.listdir(place) == [ERRORS]
        assert "huge.raw as vhd: " in (place / ERRORS).read_text()
        with pytest.raises(FileNotFoundError):
            (place / "other.vhd").stat()
    assert "huge.raw/vhd/huge.vhd: cannot be made" in running.said


def test_find_sees_files_of_any_size_and_a_stat_their_size(tmp_path: Path, point: Path) -> None:
    make_disk(tmp_path / "disk.raw", 8 * MIB)
    with mounted(tmp_path, point):
        place = point / "disk.raw" / "vhdx"
        (found,) = os.scandir(place)
        assert found.is_file(follow_symlinks=False)
        size = found.stat().st_size
        assert size == len(Path(found.path).read_bytes())
        assert stat.S_ISREG(found.stat().st_mode)


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        ("qcow2", ["qcow2"]),
        ("vhdx, raw", ["raw", "vhdx", "vhdx-fixed"]),
        ("vmdk-vmfs,partitions", ["partitions", "vmdk-vmfs"]),
    ],
)
def test_only_the_chosen_formats_are_shown(tmp_path: Path, point: Path, formats: str, expected: list[str]) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    with mounted(tmp_path, point, "--formats", formats):
        assert sorted(os.listdir(point / "disk.raw")) == expected


def test_an_unknown_format_is_refused(tmp_path: Path, point: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mount", "--formats", "qcow2,vdmk", str(tmp_path), str(point)]) == 2
    said = capsys.readouterr().err
    assert "--formats: 'vdmk' is no format that a mount shows" in said
    assert "did you mean vmdk? " in said
