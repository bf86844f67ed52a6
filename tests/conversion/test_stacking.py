"""Chains whose layers differ in size: everything that stacks layers, against a model that does so byte by byte.

`VMCONV_STACKS` is how many chains are tried; see `stacks.py` for what they are like.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import QemuImg
from support.requirements import oracle_program
from support.stacks import Stack, content, make_stack
from vmconv.conversion.views import views
from vmconv.errors import PlanError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.view import View

COUNT = int(os.environ.get("VMCONV_STACKS", "24"))
FIRST = int(os.environ.get("VMCONV_STACKS_FROM", "0"))
READ_BY_QEMU = ("qcow2", "qed", "vmdk", "vdi", "vhdx", "parallels")

Case = tuple[Stack, bytes, random.Random]


@pytest.fixture(params=range(FIRST, FIRST + COUNT), scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Stack:
    oracle_program("qemu-io")
    return make_stack(tmp_path_factory.mktemp("stack"), request.param)


@pytest.fixture
def stack(chain: Stack, request: pytest.FixtureRequest) -> Case:
    """A chain, all that a guest reads of it, and choices that belong to it."""
    return chain, content(chain.layers), random.Random(request.node.name)


@pytest.fixture
def beside(chain: Stack) -> Iterator[Path]:
    """The directory of the chain; what a test makes there is gone after it."""
    directory = chain.files[0].parent
    yield directory
    for path in set(directory.iterdir()) - set(chain.files):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def convert(source: Path, target: Path, **request: Any) -> Path | None:
    """Converts; returns None for what the format cannot hold."""
    try:
        vmconv.convert(str(source), str(target), cache="unsafe", **request)
    except PlanError as exc:
        assert "as large as its parent" in str(exc) or "has a parent" in str(exc) or "must be" in str(exc), exc
        return None
    return target


def guest(qemu_img: QemuImg, image: Path, format_name: str) -> bytes:
    """Returns what QEMU reads."""
    raw = image.with_name("read.raw")
    qemu_img("convert", "-f", format_name, "-O", "raw", image, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def ours(image: Path, format_name: str | None = None) -> bytes:
    """Returns what a view of the disk reads, as a mount or an export."""
    with Opener(installed()) as opener:
        view = View(opener.image(str(image), format_name).flat)
        return view.read(0, view.size)


def same(read: bytes, wanted: bytes) -> bool:
    """True when a disk is the wanted one; what a format rounds its size up by reads as zero."""
    return len(read) >= len(wanted) and read == wanted.ljust(len(read), b"\0")


def streamed(source: Path, target_format: str) -> bytes:
    reader, writer = os.pipe()
    parts: list[bytes] = []

    def read() -> None:
        with os.fdopen(reader, "rb") as pipe:
            parts.append(pipe.read())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        vmconv.stream(str(source), writer, target_format)
    finally:
        os.close(writer)
        thread.join()
    return parts[0]


def test_the_model_equals_qemu_s_reading(stack: Case, qemu_img: QemuImg) -> None:
    made, wanted, _ = stack
    assert guest(qemu_img, made.files[0], made.formats[0]) == wanted


def test_flattening(stack: Case, beside: Path, qemu_img: QemuImg) -> None:
    made, wanted, rng = stack
    raw = convert(made.files[0], beside / "flat.raw")
    assert raw and raw.read_bytes() == wanted
    name = rng.choice(READ_BY_QEMU)
    image = convert(made.files[0], beside / f"flat.{name}", target_format=name)
    assert image and same(guest(qemu_img, image, name), wanted)
    assert same(ours(made.files[0]), wanted)


def test_a_part_of_the_disk(stack: Case, beside: Path, qemu_img: QemuImg) -> None:
    made, wanted, rng = stack
    sectors = len(wanted) // 512
    first = rng.randrange(sectors)
    count = rng.randint(1, sectors - first)
    part = {"offset": first * 512, "length": count * 512, "verify": "bytes"}
    raw = convert(made.files[0], beside / "part.raw", **part)
    assert raw and raw.read_bytes() == wanted[first * 512 :][: count * 512]
    name = rng.choice(READ_BY_QEMU)
    image = convert(made.files[0], beside / f"part.{name}", target_format=name, **part)
    assert image and same(guest(qemu_img, image, name), raw.read_bytes())


def test_comparing(stack: Case, beside: Path) -> None:
    made, wanted, rng = stack
    raw = beside / "wanted.raw"
    raw.write_bytes(wanted)
    assert vmconv.compare(str(made.files[0]), str(raw))
    at = rng.randrange(len(wanted))
    raw.write_bytes(wanted[:at] + bytes([wanted[at] ^ 1]) + wanted[at + 1 :])
    assert vmconv.compare(str(made.files[0]), str(raw)).first_difference == at


def test_keeping_a_part_of_the_chain(stack: Case, beside: Path, qemu_img: QemuImg) -> None:
    made, wanted, rng = stack
    for base in made.files[1:]:
        name = rng.choice(("qcow2", "qed"))
        image = convert(made.files[0], beside / f"on-{base.stem}.{name}", backing_file=base.name)
        assert image and same(guest(qemu_img, image, name), wanted), (base, name)
        assert same(ours(image), wanted)
    vmconv.convert(str(made.files[0]), str(beside / "compat.qcow2"), backing_file=base.name, options={"compat": "0.10"})
    assert same(guest(qemu_img, beside / "compat.qcow2", "qcow2"), wanted)


@pytest.mark.parametrize("name", ["qcow2", "qed", "vmdk", "vdi", "vhd", "vhdx"])
def test_keeping_the_whole_chain(stack: Case, beside: Path, qemu_img: QemuImg, name: str) -> None:
    made, wanted, _ = stack
    (beside / "new").mkdir()
    image = convert(made.files[0], beside / "new" / f"top.{name}", target_format=name, chain=True)
    if image is None:
        assert name in ("vmdk", "vdi", "vhd", "vhdx")
        assert not os.listdir(beside / "new")
        return
    assert same(ours(image, name), wanted)
    if name in ("qcow2", "qed", "vmdk"):
        assert same(guest(qemu_img, image, name), wanted)


def test_mapping(stack: Case, qemu_img: QemuImg) -> None:
    made, wanted, _ = stack
    printed = qemu_img("map", "--output=json", "-f", made.formats[0], made.files[0]).stdout
    theirs = mapped(json.loads(printed), made)
    rows = [row.as_json() for row in vmconv.map_disk(str(made.files[0]))]
    assert mapped(rows, made) == theirs
    assert not any(
        wanted[at] for row in rows if row["zero"] for at in range(row["start"], row["start"] + row["length"])
    )


def mapped(rows: list[dict[str, Any]], made: Stack) -> list[tuple[Any, ...]]:
    """Returns what a map says of each address: how each format has it for some, which layer it is in for all."""
    said = []
    for row in rows:
        keys = ("depth", "present", "zero", "data") if made.formats[row["depth"]] in ("qcow2", "qed") else ("depth",)
        said += [tuple(row[key] for key in keys)] * row["length"]
    return said


def test_referring(stack: Case, beside: Path, qemu_img: QemuImg) -> None:
    made, wanted, _ = stack
    options = {"subformat": "reference"}
    image = convert(made.files[0], beside / "flat.vmdk", options=options)
    assert image and same(guest(qemu_img, image, "vmdk"), wanted)
    image = convert(made.files[0], beside / "above.qcow2", options=options)
    assert image and same(guest(qemu_img, image, "qcow2"), wanted)


def test_streaming_and_viewing(stack: Case, beside: Path, qemu_img: QemuImg) -> None:
    made, wanted, rng = stack
    assert streamed(made.files[0], "raw") == wanted
    name = rng.choice(("qcow2", "vhdx", "vdi", "qed"))
    image = beside / "sent.img"
    image.write_bytes(streamed(made.files[0], name))
    assert same(guest(qemu_img, image, name), wanted)
    with Opener(installed()) as opener:
        disk = opener.image(str(made.files[0]))
        (view,) = views(disk, installed().format(name), {}, "viewed").values()
        image.write_bytes(view.read(0, view.size))
    assert same(guest(qemu_img, image, name), wanted)


def test_several_formats_at_once(stack: Case, beside: Path, qemu_img: QemuImg) -> None:
    made, wanted, _ = stack
    (beside / "all").mkdir()
    names = ["qcow2", "vhdx", "vmdk"]
    for result in vmconv.fanout(str(made.files[0]), names, directory=str(beside / "all"), cache="unsafe"):
        assert same(guest(qemu_img, Path(result.target), result.target_format), wanted)


def test_converting_a_layer_in_place(stack: Case, beside: Path, qemu_img: QemuImg) -> None:
    made, wanted, _ = stack
    source, target = beside / f"copy.{made.formats[0]}", beside / "new.qcow2"
    source.write_bytes(made.files[0].read_bytes())
    try:
        vmconv.convert(str(source), str(target), backing_file=made.files[1].name, in_place=True)
    except PlanError as exc:
        # A qcow2 is not converted to itself, and payload may lie where it cannot stay.
        assert source.exists(), exc
        return
    assert same(ours(target), wanted)
    assert same(guest(qemu_img, target, "qcow2"), wanted)
