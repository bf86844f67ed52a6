"""Pictures of disks and plans: strips against a byte-by-byte model, files that need no others, and how they look."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from vmconv.cli.main import main
from vmconv.inspect import strips
from vmconv.inspect.strips import Category, Ranges, strip
from vmconv.model.sources import File

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"

NOTHING, LITTLE, MUCH = (Category("hole", "nothing", payload=False), Category("a", "a"), Category("b", "b"))


@st.composite
def spaces(draw: st.DrawFn) -> tuple[list[int], int]:
    """Returns the category of each byte of a small address space, and a number of parts."""
    runs = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=12))
    return [category for category, length in runs for _ in range(length)], draw(st.integers(1, 50))


@given(spaces())
def test_a_strip_shows_what_a_model_of_bytes_shows(space: tuple[list[int], int]) -> None:
    content, parts = space
    size = len(content)
    edges = [0, *(at for at in range(1, size) if content[at] != content[at - 1]), size]
    runs = [(start, end - start, content[start]) for start, end in itertools.pairwise(edges)]
    columns = zip(*[run for run in runs if run[2]] or [(0, 0, 1)], strict=True)
    ranges = Ranges(*(np.array(column, dtype=np.int64) for column in columns))
    found = strip("", size, ranges, (NOTHING, LITTLE, MUCH), parts)
    assert list(found.bytes) == [content.count(category) for category in range(3)]
    # Each byte in as many equal pieces as there are parts: a part has as many pieces as there are bytes.
    pieces = np.repeat(np.array(content), parts).reshape(parts, size)
    for part, there in enumerate(pieces):
        counts = [int((there == category).sum()) for category in range(3)]
        best = max((1, 2), key=lambda category: counts[category]) if counts[1] or counts[2] else 0
        shown = int(found.category[part])
        # Equal shares may be shown as either.
        assert counts[shown] == counts[best] and (shown == 0) == (best == 0)
        # Exactly a half is rounded.
        assert counts[shown] * 2 == size or bool(found.full[part]) == (counts[shown] * 2 > size)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(0, 2)), max_size=8))
def test_what_several_ranges_have_counts_once(rows: list[tuple[int, int, int]]) -> None:
    columns = zip(*rows or [(0, 0, 0)], strict=True)
    found = strips._once(Ranges(*(np.array(column, dtype=np.int64) for column in columns)))
    owner: dict[int, int] = {}
    # The first range that reaches a byte has it, of those with the same start the one that was named first.
    for start, length, category in sorted(rows, key=lambda row: row[0]):
        for at in range(start, start + length):
            if at > max(owner, default=-1):
                owner[at] = category
    shown = {
        at: category
        for start, length, category in zip(*(column.tolist() for column in found), strict=True)
        for at in range(start, start + length)
    }
    assert shown == owner
    assert int(found.length.sum()) == len(owner)
    assert not len(found.length) or int(found.length.min()) > 0 or not rows


@pytest.mark.parametrize("size", [1 << 40, (1 << 62) - 4096, 3 << 33])
@pytest.mark.parametrize("parts", [7, 940, 4000])
def test_rounding_shows_no_payload_where_there_is_none(size: int, parts: int) -> None:
    """The first category of a file is payload: its share is what the others leave."""
    rest, hole = Category("metadata", "rest"), Category("hole", "hole", payload=False)
    ranges = Ranges(np.array([size // 3]), np.array([size - size // 3]), np.array([1]))
    found = strip("", size, ranges, (rest, hole), parts)
    first = -(-parts // 3)
    assert found.category[: parts // 3].tolist() == [0] * (parts // 3)
    assert found.category[first:].tolist() == [1] * (parts - first)
    assert found.bytes == (size // 3, size - size // 3)


def picture(directory: Path, command: str, *arguments: object, suffix: str = ".svg") -> str:
    path = directory / f"{command}{suffix}"
    path.unlink(missing_ok=True)
    assert main([command, "--picture", str(path), *map(str, arguments)]) == 0
    return path.read_text()


def texts(text: str) -> list[ET.Element]:
    return list(ET.fromstring(text).iter(f"{SVG}text"))


def legend(text: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(text).iter(f"{SVG}text") if not element.get("class")]


@pytest.fixture
def chain(tmp_path: Path, qemu_img: QemuImg) -> Path:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    with base.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(8 * MIB)
        file.write(b"b" * 4 * MIB)
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", top)
    qemu_io(top, "write -P 7 16M 2M", "write -z 8M 1M")
    return top


def test_the_sums_are_those_of_the_disk(chain: Path, tmp_path: Path) -> None:
    text = picture(tmp_path, "map", chain)
    assert "2 MiB payload of top.qcow2" in legend(text) and "3 MiB payload of base.raw" in legend(text)
    assert "1 MiB zero" not in legend(text) and "59 MiB zero" in legend(text)


def test_what_is_not_allocated_is_no_zero(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "layer.qcow2"
    qemu_img("create", "-f", "qcow2", path, "64M")
    qemu_io(path, "write -P 7 16M 2M", "write -z 8M 1M")
    assert {"61 MiB not allocated, reads as zero", "1 MiB zero"} <= set(legend(picture(tmp_path, "map", path)))


def test_the_extents_of_a_file_are_counted(xfs_dir: Path) -> None:
    disk = xfs_dir / "disk.raw"
    with disk.open("wb") as file:
        for at in (0, 8 * MIB, 20 * MIB):
            file.seek(at)
            file.write(b"x" * MIB)
    assert any(
        "disk.raw, 3 extents on storage" in (element.text or "") for element in texts(picture(xfs_dir, "map", disk))
    )


def test_a_device_has_no_holes(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", MIB)
    with disk.open("rb") as opened:
        file = File(str(disk), os.dup(opened.fileno()))
        file.is_device = True
        assert [len(column) for column in strips._holes(file)] == [0, 0, 0]
        file.close()


def test_compressed_payload_is_hatched(chain: Path, tmp_path: Path, qemu_img: QemuImg) -> None:
    packed = tmp_path / "packed.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", chain, packed)
    text = picture(tmp_path, "map", packed)
    assert "5 MiB compressed payload" in legend(text)
    assert len(re.findall(r'<path fill="url\(#hatch\)"', text)) == 1
    assert any("metadata, compressed payload" in line for line in legend(text))


def test_the_picture_of_a_plan_shows_what_is_shared_and_copied(reflink_dir: Path) -> None:
    disk = make_disk(reflink_dir / "disk.raw", 4 * MIB)
    plan = vmconv.plan(disk, reflink_dir / "disk.vmdk")
    found = legend(picture(reflink_dir, "plan", disk, reflink_dir / "disk.vmdk"))
    assert any(line.endswith("shared with the source") for line in found)
    assert not any("copied" in line for line in found)
    found = legend(picture(reflink_dir, "plan", "--backend", "copy", disk, reflink_dir / "disk.vmdk"))
    assert any(line.endswith("copied") for line in found) and plan.totals.shared


def test_a_picture_needs_no_other_file_and_runs_nothing(tmp_path: Path) -> None:
    hostile = make_disk(tmp_path / "<script>alert(1)</script>&\x1b[31m.raw".replace("/", "\u2215"), MIB)
    for suffix in (".svg", ".html"):
        text = picture(tmp_path, "map", hostile, suffix=suffix)
        assert "<script" not in text and "\x1b" not in text
        links = re.findall(r'(?:href|src|url\()\s*=?\s*["\']?([^"\')\s>]+)', text)
        assert set(links) <= {"#hatch"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 940])
def test_a_browser_shows_all_of_it(browser: Any, chain: Path, tmp_path: Path, width: int, scheme: str) -> None:
    picture(tmp_path, "map", chain, suffix=".html")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto((tmp_path / "map.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    looks = {}
    for look in ("ground", "zero", "layer0", "layer1", "metadata"):
        looks[look] = page.evaluate(f"getComputedStyle(document.querySelector('svg .{look}')).fill")
    assert len(set(looks.values())) == len(looks)
    assert (looks["ground"] == "rgb(255, 255, 255)") == (scheme == "light")
    for look in looks:
        shape = page.evaluate(f"document.querySelector('svg .{look}').getBoundingClientRect().toJSON()")
        assert shape["width"] > 0 and shape["height"] > 0 and shape["left"] >= 0 and shape["right"] <= width
    page.close()


def test_a_picture_replaces_no_file(tmp_path: Path, capsys: Capture) -> None:
    disk = make_disk(tmp_path / "disk.raw", MIB)
    taken = tmp_path / "taken.svg"
    taken.write_text("mine")
    assert main(["map", "--picture", str(taken), str(disk)]) == 4
    assert "taken.svg: already exists" in capsys.readouterr().err and taken.read_text() == "mine"
    with pytest.raises(SystemExit):
        main(["map", "--picture", str(tmp_path / "disk.png"), str(disk)])
    assert "a picture is .svg or .html" in capsys.readouterr().err
    assert main(["map", "--bar", "--output", "json", str(disk)]) == 2


def test_the_terminal_shows_the_same(chain: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "68")
    assert main(["map", "--bar", str(chain)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the guest's disk, qcow2: 64 MiB"
    # A line has 16 MiB: payload of the base at 9 to 12, of the layer at 16 to 18.
    assert lines[1].strip() == "░" * 36 + "█" * 12 + "░" * 16
    assert lines[2].strip() == "█" * 8 + "░" * 56


def test_the_pictures_of_the_documentation_are_what_its_command_makes(xfs_dir: Path) -> None:
    def fixed(text: str) -> str:
        # Where a filesystem puts blocks is not ours.
        return re.sub(r"\d+ extents?", "extents", text)

    made = _script().make(xfs_dir)
    for name, text in made.items():
        assert fixed(text) == fixed((ROOT / "docs/pictures" / name).read_text()), "python docs/pictures.py DIR"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
