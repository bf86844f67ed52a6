"""Disks and memory are two kinds: nothing turns one into the other, and what lists formats asks for the kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import vmconv
from support import memory_images as images
from support.disks import MIB, make_disk
from vmconv.api import views
from vmconv.cli.main import main
from vmconv.errors import ImageError, PluginError, UsageError
from vmconv.interface.format import Format
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Returns a disk and a memory image."""
    disk = make_disk(tmp_path / "disk.raw", MIB, pieces=1)
    memory = tmp_path / "web.elf"
    memory.write_bytes(images.elf_core(images.ranges(images.ram())))
    return disk, memory


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("target", sorted(name for name, one in installed().formats.items() if one.can_write))
def test_memory_never_becomes_a_disk(both: tuple[Path, Path], tmp_path: Path, target: str) -> None:
    before = files(tmp_path)
    for make in (vmconv.convert, vmconv.plan):
        with pytest.raises(UsageError, match=f"web.elf: is a memory image, and {target} holds a disk") as caught:
            make(str(both[1]), str(tmp_path / "new"), target_format=target)
        assert "elfcore" in (caught.value.hint or "")
    assert files(tmp_path) == before


@pytest.mark.parametrize("target", ["elfcore", "lime", "ram", "vmem"])
def test_a_disk_never_becomes_memory(both: tuple[Path, Path], tmp_path: Path, target: str) -> None:
    before = files(tmp_path)
    for make in (vmconv.convert, vmconv.plan):
        with pytest.raises(UsageError, match=f"disk.raw: is a disk, and {target} holds a memory image") as caught:
            make(str(both[0]), str(tmp_path / "new"), target_format=target)
        assert "qcow2" in (caught.value.hint or "")
    assert files(tmp_path) == before


def test_other_ways_refuse_it_too(both: tuple[Path, Path], tmp_path: Path) -> None:
    disk, memory = map(str, both)
    tries: list[Callable[[], object]] = [
        lambda: vmconv.fanout(memory, ["lime", "qcow2"], directory=str(tmp_path)),
        lambda: vmconv.compare(disk, memory),
        lambda: vmconv.prove(memory, disk),
        lambda: vmconv.convert(memory, str(tmp_path / "web.lime"), in_place=True),
    ]
    vmconv.convert(disk, str(tmp_path / "old.qcow2"))
    vmconv.convert(memory, str(tmp_path / "old.lime"))
    tries += [
        lambda: vmconv.sync(memory, str(tmp_path / "old.lime")),
        lambda: vmconv.sync(memory, str(tmp_path / "old.qcow2")),
        lambda: vmconv.sync(disk, str(tmp_path / "old.lime")),
    ]
    before = files(tmp_path)
    for each in tries:
        with pytest.raises(UsageError) as caught:
            each()
        assert "\n" not in str(caught.value)
    with (tmp_path / "stream").open("wb") as out, pytest.raises(UsageError, match="is a memory image"):
        vmconv.stream(memory, out.fileno(), "vhd")
    with Opener(installed()) as opener:
        image = opener.image(memory)
        with pytest.raises(UsageError, match="and raw holds a disk"):
            views(image, installed().format("raw"), {}, "web.raw")
    assert files(tmp_path) - before == {"stream"}
    assert (tmp_path / "stream").read_bytes() == b""


@pytest.mark.parametrize("content", [b"", bytes(5000)], ids=["empty", "zeros"])
@pytest.mark.parametrize("suffix", ["lime", "elf", "vmss", "avml", "kdump", "mig", "save", "vmrs"])
def test_a_file_with_a_name_of_memory_and_no_signature_is_no_disk(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"web.{suffix}"
    path.write_bytes(content)
    for verb in (vmconv.info, lambda source: vmconv.convert(source, str(tmp_path / "new.raw"))):
        with pytest.raises(
            ImageError, match=rf"^web.{suffix}: no signature of \w+, the format of its suffix"
        ) as caught:
            verb(str(path))
        assert caught.value.hint == "if it is raw memory, use -f ram; if it is a raw disk, use -f raw"


def test_memory_is_no_backing_file(both: tuple[Path, Path], tmp_path: Path) -> None:
    qcow2 = tmp_path / "top.qcow2"
    vmconv.convert(str(both[0]), str(qcow2))
    data = bytearray(qcow2.read_bytes())
    # The backing file's name, at 512 in the header's cluster.
    data[8:20] = (512).to_bytes(8, "big") + (7).to_bytes(4, "big")
    data[512:519] = b"web.elf"
    qcow2.write_bytes(data)
    with pytest.raises(ImageError, match=r"web\.elf: is a memory image \(elfcore\), and a disk was expected"):
        vmconv.convert(str(qcow2), str(tmp_path / "flat.raw"))


@pytest.mark.parametrize(("kind", "has", "has_not"), [("disk", "raw", "ram"), ("memory", "ram", "raw")])
def test_formats_of_one_kind_are_listed(capsys: Capture, kind: str, has: str, has_not: str) -> None:
    assert main(["formats", "--kind", kind, "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["formats"]
    assert {one["kind"] for one in found} == {kind}
    names = {one["name"] for one in found}
    assert has in names
    assert has_not not in names


def test_formats_of_both_kinds_are_listed(capsys: Capture) -> None:
    assert main(["formats"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["raw", "disk"] in lines
    assert ["ram", "memory"] in lines


def test_the_registry_keeps_the_kinds_apart() -> None:
    found = installed()
    assert {one.kind for one in found.formats.values()} == {"disk"}
    assert {one.kind for one in found.memory_formats.values()} == {"memory"}
    assert set(found.all_formats) == {*found.formats, *found.memory_formats}
    assert found.format_by_suffix("web.vmss", "disk") is None
    assert found.format_by_suffix("web.vmss", "memory") == "vmem"


def test_a_reader_of_another_kind_is_a_defect_of_its_plugin(tmp_path: Path) -> None:
    class Wrong(type(installed().format("elfcore"))):  # type: ignore[misc]
        kind = "disk"

    wrong: Format = Wrong()
    path = tmp_path / "web.elf"
    path.write_bytes(images.elf_core(images.ranges(images.ram())))
    with (
        Opener(Registry({"elfcore": wrong})) as opener,
        pytest.raises(PluginError, match="returns an image of kind memory, the format is of kind disk"),
    ):
        opener.image(str(path))


@pytest.mark.parametrize("name", ["memory.ram", "memory.MEM", "web.vmem"])
def test_memory_without_a_signature_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    path = images.sparse(tmp_path / name, images.ram())
    target = tmp_path / "web.lime"
    vmconv.convert(str(path), str(target))
    assert vmconv.info(str(path))["format"] == ("vmem" if name.endswith("vmem") else "ram")
    assert vmconv.compare(str(path), str(target))


@pytest.mark.parametrize("name", ["memory.elf", "memory.lime", "memory.vmss"])
def test_a_name_without_its_signature_is_refused(tmp_path: Path, name: str) -> None:
    path = images.sparse(tmp_path / name, images.ram())
    with pytest.raises(ImageError, match="no signature of"):
        vmconv.convert(str(path), str(tmp_path / "new.ram"))


def test_a_program_is_no_memory_image(tmp_path: Path) -> None:
    path = tmp_path / "program.elf"
    data = bytearray(images.elf_core(images.ranges(images.ram())))
    data[16:18] = b"\2\0"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="signature of ELF file, which is not a disk"):
        vmconv.convert(str(path), str(tmp_path / "new.ram"))
