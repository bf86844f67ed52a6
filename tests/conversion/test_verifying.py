"""`--verify`: each mode passes what is right and catches what is wrong, before the target has its name."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.requirements import oracle_program
from support.sources import SOURCES
from vmconv.conversion import execute, qemu, readback, walk
from vmconv.errors import UsageError, VerifyError
from vmconv.model.extents import Extents, Kind
from vmconv.model.sources import File
from vmconv.testing import tables

READING = ("sample", "bytes", "qemu")
SIZE = 8 * MIB


@pytest.fixture
def chain(tmp_path: Path, qemu_img: QemuImg) -> Path:
    """Three layers, of which the middle one is shorter than the others; the base is full."""
    base, middle, top = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    qemu_img("create", "-f", "qcow2", base, str(SIZE))
    qemu_io(base, f"write -P 1 0 {SIZE}")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", middle, str(SIZE // 2))
    qemu_img("create", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top, str(SIZE))
    qemu_io(top, "write -P 3 1M 1M")
    return top


@given(st.lists(tables(SOURCES), min_size=1, max_size=4), st.integers(0, 200), st.integers(0, 200))
def test_walking_is_asking_each_layer_for_each_byte(layers: list[Extents], start: int, length: int) -> None:
    def byte(address: int) -> int:
        for layer in layers:
            if address >= layer.size:
                return 0
            row = next(row for row in layer if row.start <= address < row.end)
            if row.kind != Kind.HOLE:
                return row.source.read(row.offset + address - row.start, 1)[0] if row.source else 0
        return 0

    assert walk.read(layers, start, length) == bytes(byte(at) for at in range(start, start + length))
    found = list(walk.pieces(layers, start, start + length)) if length else []
    assert sum(piece.length for piece in found) == length
    edges = walk.edges(layers).tolist()
    assert all(low < high for low, high in itertools.pairwise(edges))
    assert {row.start for layer in layers for row in layer} <= set(edges)


# -- what is right


@pytest.mark.parametrize("mode", ["metadata", *READING])
@pytest.mark.parametrize(
    ("target", "how"),
    [
        ("new.raw", {}),
        ("new.vmdk", {"options": {"subformat": "twoGbMaxExtentSparse"}}),
        ("new.vmdk", {"options": {"subformat": "monolithicFlat"}}),
        ("new.vmdk", {"options": {"subformat": "reference"}}),
        ("new.qcow2", {"options": {"subformat": "reference"}}),
        ("new.vhd", {}),
        ("new.vhdx", {}),
        ("new.vdi", {}),
        ("new.hds", {}),
        ("new.qed", {"chain": True}),
        ("new.qed", {"backing_file": "base.qcow2"}),
    ],
    ids=str,
)
def test_valid_images_pass(chain: Path, mode: Any, target: str, how: dict[str, Any]) -> None:
    if mode == "qemu":
        oracle_program("qemu-img")
    new = chain.with_name(target)
    vmconv.convert(str(chain), str(new), verify=mode, cache="unsafe", **how)
    assert vmconv.compare(str(chain), str(new))


@pytest.mark.parametrize("mode", READING)
def test_images_of_several_formats_are_verified_each(chain: Path, mode: Any) -> None:
    if mode == "qemu":
        oracle_program("qemu-img")
    made = vmconv.fanout(str(chain), ["raw", "vmdk", "vhdx"], directory=str(chain.parent), verify=mode)
    assert len(made) == 3


def test_the_bytes_to_be_read_are_announced_first(chain: Path) -> None:
    calls: list[tuple[int, int]] = []
    vmconv.convert(
        str(chain), str(chain.with_name("new.raw")), verify="bytes", verifying=lambda *call: calls.append(call)
    )
    # What is data on both sides: the first half of the disk.
    assert calls[0] == (0, SIZE)
    assert calls[-1] == (SIZE, SIZE)
    assert calls == sorted(calls)


def test_the_command_reports_it_too(chain: Path) -> None:
    command = [sys.executable, "-m", "vmconv", "convert", "--verify=bytes", str(chain), str(chain.with_name("new.raw"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"verifying: 8 MiB ({SIZE} bytes) to read of source and result" in done.stderr
    done = subprocess.run([*command, "--force", "--output=json"], capture_output=True, text=True, check=True)
    assert f'{{"event": "verify", "done": 0, "total": {SIZE}}}' in done.stdout
    done = subprocess.run([*command, "--force", "--no-verify"], capture_output=True, text=True, check=True)
    assert "verifying" not in done.stderr


def test_a_stream_is_read_before_it_is_sent(chain: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with (tmp_path / "sent.raw").open("wb") as file:
        vmconv.stream(str(chain), file.fileno(), "raw", verify="bytes", verifying=lambda *call: calls.append(call))
    assert calls[-1] == (SIZE, SIZE)
    assert vmconv.compare(str(chain), str(tmp_path / "sent.raw"))


# -- what is wrong


def fails(source: Path, /, mode: Any, target: str = "new.raw", **how: Any) -> str:
    """Converts what must be found wrong, and left behind nothing, and returns the error's message."""
    before = sorted(os.listdir(source.parent))
    with pytest.raises(VerifyError) as caught:
        vmconv.convert(str(source), str(source.with_name(target)), verify=mode, **how)
    assert sorted(os.listdir(source.parent)) == before
    return str(caught.value)


@pytest.fixture
def corrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets storage change a byte of what was made, at an offset of the last file."""

    def at(offset: int) -> None:
        make = execute.make

        def worse(*arguments: Any) -> list[File]:
            files = make(*arguments)
            descriptor = os.open(f"/proc/self/fd/{files[-1].descriptor}", os.O_RDWR)
            byte = os.pread(descriptor, 1, offset)[0]
            os.pwrite(descriptor, bytes([byte ^ 1]), offset)
            os.fsync(descriptor)
            os.close(descriptor)
            return files

        monkeypatch.setattr(execute, "make", worse)

    return at


@pytest.mark.parametrize("mode", READING)
def test_a_byte_that_storage_changed_at_an_edge(chain: Path, mode: Any, corrupted: Callable[[int], None]) -> None:
    if mode == "qemu":
        oracle_program("qemu-img")
    corrupted(2 * MIB)
    assert "differs from the source" in fails(chain, mode)


@pytest.mark.parametrize("mode", ["bytes", "qemu"])
def test_a_byte_that_storage_changed_anywhere(chain: Path, mode: Any, corrupted: Callable[[int], None]) -> None:
    corrupted(3 * MIB + 12345)
    assert "differs from the source" in fails(chain, mode)


def nothing(*_: object) -> None:
    """Finds nothing wrong."""


def wrongly_stacked(layer: Extents, parent: Extents) -> Extents:
    """Stacks as if what lies past the end of a parent were for the next one to say."""
    below = parent.window(0, layer.size)
    starts, ends = layer.start[layer.kind == Kind.HOLE], layer.end[layer.kind == Kind.HOLE]
    return layer.replaced(below, starts, ends - starts)


@pytest.mark.parametrize("mode", ["metadata", *READING])
def test_layers_that_were_stacked_wrongly(chain: Path, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The algebra has the same fault on both sides, and so sees nothing."""
    monkeypatch.setattr(Extents, "over", wrongly_stacked)
    if mode == "metadata":
        assert "guest address 0x400000" in fails(chain, mode)
        assert "guest address" in fails(chain, mode, "new.qcow2", backing_file="base.qcow2")
    monkeypatch.setattr(readback, "check_places", nothing)
    assert mode == "metadata" or "differs from the source" in fails(chain, mode)


@pytest.mark.parametrize("mode", ["metadata", *READING])
def test_a_writer_that_exchanges_two_ranges(chain: Path, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmconv_raw import writer

    def write(image: Any, *_: Any) -> Any:
        from vmconv.model.layout import Layout, OutFile

        flat = image.flat
        parts = [flat.window(2 * MIB, MIB), flat.window(MIB, MIB), flat.window(0, MIB), flat.window(3 * MIB, SIZE)]
        rows = [
            (at * MIB + row.start, row.kind, row.source, row.offset)
            for at, part in enumerate(parts)
            for row in part.without_holes()
            if at * MIB + row.start < SIZE
        ]
        return Layout((OutFile(Extents.of(rows, SIZE)),))

    # Three ranges with three contents.
    qemu_io(chain, "write -P 7 2M 1M")
    monkeypatch.setattr(writer, "write", write)
    if mode != "metadata":
        # As if the algebra were blind.
        monkeypatch.setattr("vmconv.conversion.verify._check_table", nothing)
        monkeypatch.setattr(readback, "check_places", nothing)
    assert "differs from the source" in fails(chain, mode)


def test_a_writer_that_states_another_format_of_the_parent(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmconv_qcow2 import writer

    write = writer.write

    def wrongly(image: Any, options: Any, placement: Any, *, backing: Any) -> Any:
        return write(image, options, placement, backing=backing._replace(format="raw"))

    monkeypatch.setattr(writer, "write", wrongly)
    said = fails(chain, "metadata", "new.qcow2", backing_file="base.qcow2")
    assert "states the format 'raw' of its parent, which is 'qcow2'" in said


# -- what cannot be done


def refused(source: Path, mode: Any, target: str = "new.qed", **how: Any) -> str:
    before = sorted(os.listdir(source.parent))
    with pytest.raises(UsageError) as caught:
        vmconv.convert(str(source), str(source.with_name(target)), verify=mode, **how)
    assert sorted(os.listdir(source.parent)) == before
    return str(caught.value)


def test_without_qemu_nothing_is_begun(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs the program qemu-img" in refused(chain, "qemu")


@pytest.mark.parametrize("mode", READING)
def test_in_place_there_is_no_source_to_compare_with(chain: Path, mode: Any) -> None:
    assert "--in-place exclude each other" in refused(chain, mode, backing_file="middle.qcow2", in_place=True)


def test_formats_unknown_to_qemu_are_refused_by_name(chain: Path, qemu_img: QemuImg) -> None:
    same = make_disk(chain.with_name("same.raw"), SIZE)
    layer = chain.with_name("layer.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", same.name, "-F", "raw", layer)
    assert "QEMU" in refused(layer, "qemu", "layer.vhdx", chain=True)
    assert "QEMU refuses differencing VDI" in refused(layer, "qemu", "layer.vdi", chain=True)
    qemu_img("snapshot", "-c", "before", same.with_name("top.qcow2"))
    assert "no internal snapshots" in refused(chain, "qemu", snapshot="before")


def test_qemu_reads_no_stream(chain: Path, tmp_path: Path) -> None:
    with (tmp_path / "sent.raw").open("wb") as file, pytest.raises(UsageError, match="QEMU cannot read a stream"):
        vmconv.stream(str(chain), file.fileno(), "raw", verify="qemu")


@pytest.mark.parametrize("mode", ["byte", "", 1, None])
def test_an_unknown_mode_is_refused(chain: Path, mode: Any) -> None:
    assert "verify" in refused(chain, mode)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exec sleep 100", "did not end within 0 s"),
        ("echo first >&2; echo broken >&2; exit 2", "cannot be compared, says qemu-img: broken"),
        ("echo 'Content mismatch at offset 5!'; exit 1", "differs from the source, says qemu-img: Content mismatch"),
        ("kill -9 $$", "cannot be compared, says qemu-img: -9"),
    ],
)
def test_a_qemu_that_fails(
    chain: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    directory = tmp_path_factory.mktemp("bin")
    program = directory / "qemu-img"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    if "sleep" in script:
        monkeypatch.setattr(qemu, "_SECONDS", 0)
    assert said in fails(chain, "qemu")
