"""A qcow2 layer that is written to: against a model of the disk, qemu-img, qemu-io and power cuts."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from vmconv.errors import PlanError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.plugin import WritableLayer
from vmconv_qcow2 import layer as layer_module

SIZE = 40 * MIB + 12 * 512
CLUSTER = 65536


class Session:
    """A layer open for writing."""

    def __init__(self, path: Path) -> None:
        self._opener = Opener(installed(), allow_external=[str(path.parent)], force_share=True)
        image = self._opener.image(str(path), "qcow2")
        descriptor = os.open(path, os.O_RDWR)
        try:
            self.layer: WritableLayer = installed().format("qcow2").open_layer(image, descriptor)
        except PlanError:
            os.close(descriptor)
            self._opener.close()
            raise

    def __enter__(self) -> WritableLayer:
        return self.layer

    def __exit__(self, *_: object) -> None:
        self.layer.close()
        self._opener.close()


def content(layer: WritableLayer) -> bytes:
    data = bytearray(layer.size)
    layer.read_into(0, memoryview(data))
    return bytes(data)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    raw = make_disk(tmp_path / "base.raw", 40 * MIB, pieces=30)
    with raw.open("r+b") as file:
        file.truncate(SIZE)
    return raw


@pytest.fixture
def overlay(base: Path) -> Path:
    path = base.with_name("overlay.qcow2")
    vmconv.create(str(path), backing_file=base.name, backing_format="raw")
    return path


def step(rng: random.Random, layer: WritableLayer, model: bytearray) -> None:
    """Writes or zeros a range, as a guest does."""
    length = rng.choice((512, 4096, 512 * rng.randint(1, 600), CLUSTER, 3 * CLUSTER))
    start = rng.randrange(0, SIZE, 512)
    if rng.random() < 0.5:
        start = start // CLUSTER * CLUSTER
    length = min(length, SIZE - start)
    if rng.random() < 0.6:
        data = rng.randbytes(length)
        layer.write(start, memoryview(data))
        model[start : start + length] = data
    else:
        layer.zero(start, length)
        model[start : start + length] = bytes(length)


@pytest.mark.parametrize("seed", range(3))
def test_the_disk_is_what_was_written(base: Path, overlay: Path, qemu_img: QemuImg, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray(base.read_bytes())
    before = bytes(model)
    for _ in range(2):
        with Session(overlay) as layer:
            assert content(layer) == model
            for _ in range(60):
                step(rng, layer, model)
                if rng.random() < 0.1:
                    layer.flush()
                at = rng.randrange(SIZE - 5000)
                found = bytearray(5000)
                layer.read_into(at, memoryview(found))
                assert found == model[at : at + 5000]
            for length, is_data in layer.spans(0, SIZE):
                assert length > 0
                assert is_data in (True, False)
            at = 0
            for length, is_data in layer.spans(0, SIZE):
                assert is_data or not any(model[at : at + length])
                at += length
            assert at == SIZE
        # Neither corruptions nor leaks.
        qemu_img("check", overlay)
    wanted = base.with_name("wanted.raw")
    wanted.write_bytes(model)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", wanted, overlay)
    assert base.read_bytes() == before


def test_the_same_writes_by_qemu_give_the_same_disk(base: Path, overlay: Path, qemu_img: QemuImg) -> None:
    rng = random.Random(5)
    other = base.with_name("qemu.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", other)
    commands = []
    with Session(overlay) as layer:
        for _ in range(60):
            start = rng.randrange(0, SIZE - MIB, 512)
            length = 512 * rng.randint(1, 500)
            pattern = rng.randrange(1, 256)
            kind = rng.choice(("write", "zero"))
            commands.append(f"write {f'-P {pattern}' if kind == 'write' else '-z -u'} {start} {length}")
            if kind == "write":
                layer.write(start, memoryview(bytes([pattern]) * length))
            else:
                layer.zero(start, length)
    qemu_io(other, *commands)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", other, overlay)


def test_qemu_goes_on_with_the_layer_and_vmconv_with_qemus(base: Path, overlay: Path, qemu_img: QemuImg) -> None:
    with Session(overlay) as layer:
        layer.write(0, memoryview(b"a" * CLUSTER))
    qemu_io(overlay, "write -P 98 1M 3M", "discard 2M 1M", "write -z 8M 64k")
    with Session(overlay) as layer:
        found = bytearray(4)
        layer.read_into(MIB, memoryview(found))
        assert found == b"bbbb"
        layer.write(MIB + 100, memoryview(b"c" * 100))
        layer.write(8 * MIB + 512, memoryview(b"d" * 512))
        layer.zero(0, CLUSTER)
    qemu_img("check", overlay)
    qemu_io(overlay, "read -P 0 0 64k", "read -P 98 1M 100", "read -P 99 1048676 100", "read -P 100 8389120 512")


def test_freed_clusters_are_used_again(overlay: Path, qemu_img: QemuImg) -> None:
    with Session(overlay) as layer:
        for number in range(20):
            layer.write(0, memoryview(bytes([number]) * 8 * CLUSTER))
            layer.flush()
            layer.zero(0, 8 * CLUSTER)
            layer.flush()
    assert overlay.stat().st_size < 24 * CLUSTER
    qemu_img("check", overlay)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (["-o", "cluster_size=4096"], "cluster_bits 12, 16 is needed"),
        (["-o", "compat=0.10"], "version 2, 3 is needed"),
        (["-o", "refcount_bits=8"], "refcount_order 3, 4 is needed"),
        (["-o", "extended_l2=on"], "incompatible features 16, 0 is needed"),
    ],
    ids=["clusters", "version", "refcounts", "subclusters"],
)
def test_other_forms_are_refused(base: Path, qemu_img: QemuImg, make: list[str], said: str) -> None:
    path = base.with_name("other.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", *make, "-b", base.name, "-F", "raw", path)
    with pytest.raises(PlanError, match=said):
        Session(path)


def test_a_damaged_layer_is_refused(overlay: Path) -> None:
    with Session(overlay) as layer:
        layer.write(0, memoryview(b"a" * CLUSTER))
    header = overlay.read_bytes()[:56]
    with overlay.open("r+b") as file:
        # The refcounts of clusters in use.
        file.seek(int.from_bytes(header[48:56], "big"))
        file.seek(int.from_bytes(file.read(8), "big"))
        file.write(bytes(8))
    with pytest.raises(PlanError, match="is damaged"):
        Session(overlay)


class Storage:
    """The calls of a layer on a disk that can lose what was not synced: sectors one by one."""

    def __init__(self, path: Path) -> None:
        self.synced = bytearray(path.read_bytes())
        self.pending: list[tuple[int, bytes]] = []
        self.calls: Callable[[float], None] = lambda _: None

    def module(self) -> Any:
        return SimpleNamespace(**{**vars(os), "pwritev": self.pwritev, "pwrite": self.pwrite, "fdatasync": self.sync})

    def pwritev(self, descriptor: int, pieces: list[memoryview], place: int) -> int:
        return self.pwrite(descriptor, b"".join(pieces), place)

    def pwrite(self, descriptor: int, data: bytes | memoryview, place: int) -> int:
        data = bytes(data)
        self.pending.append((place, data))
        self.calls(0.01)
        return os.pwrite(descriptor, data, place)

    def sync(self, descriptor: int) -> None:
        self.calls(0.5)
        for place, data in self.pending:
            put(self.synced, place, data)
        self.pending.clear()

    def after_cut(self, rng: random.Random) -> bytes:
        """Returns what the disk may have after a power cut now."""
        left = bytearray(self.synced)
        share = rng.choice((0.0, 0.5, 0.9, 1.0))
        for place, data in self.pending:
            for at in range(0, len(data), 512):
                if rng.random() < share:
                    put(left, place + at, data[at : at + 512])
        return bytes(left)


def put(disk: bytearray, place: int, data: bytes) -> None:
    if len(disk) < place + len(data):
        disk.extend(bytes(place + len(data) - len(disk)))
    disk[place : place + len(data)] = data


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_leaks_at_worst_and_loses_nothing_that_was_flushed(
    base: Path, overlay: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    storage = Storage(overlay)
    monkeypatch.setattr(layer_module, "os", storage.module())
    cuts: list[tuple[bytes, dict[int, set[bytes]]]] = []
    model = base.read_bytes()
    # What each block of the disk may read as: what was flushed, and what was written since.
    allowed = {block: {model[block * 4096 : (block + 1) * 4096]} for block in range(SIZE // 4096)}

    def cut(chance: float) -> None:
        if rng.random() < chance and len(cuts) < 20:
            cuts.append((storage.after_cut(rng), {block: set(found) for block, found in allowed.items()}))

    storage.calls = cut
    with Session(overlay) as layer:
        now = {block: next(iter(found)) for block, found in allowed.items()}
        for _ in range(150):
            block = rng.randrange(0, 400)
            count = rng.choice((1, 3, 16, 32))
            data = bytes(count * 4096) if rng.random() < 0.3 else rng.randbytes(count * 4096)
            for number in range(count):
                now[block + number] = data[number * 4096 :][:4096]
                allowed[block + number].add(now[block + number])
            if any(data):
                layer.write(block * 4096, memoryview(data))
            else:
                layer.zero(block * 4096, len(data))
            if rng.random() < 0.15:
                layer.flush()
                allowed = {block: {found} for block, found in now.items()}
    assert len(cuts) > 3
    left = overlay.with_name("left.qcow2")
    for number, (image, expected) in enumerate(cuts):
        left.write_bytes(image)
        if number % 5 == 0:
            # 3: leaked clusters only.
            done = subprocess.run(["qemu-img", "check", "-q", str(left)], capture_output=True, text=True, check=False)
            assert done.returncode in (0, 3), done.stdout
        # Opening it checks it, too.
        with Session(left) as layer:
            found = content(layer)
        for block, values in expected.items():
            one = found[block * 4096 : (block + 1) * 4096]
            # A write that was not flushed may be torn.
            assert one in values or len(values) > 1, block


def test_after_a_flush_that_failed_nothing_is_written(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(5, "Input/output error")

    with Session(overlay) as layer:
        layer.write(0, memoryview(b"a" * CLUSTER))
        with monkeypatch.context() as patched:
            patched.setattr(layer_module, "os", SimpleNamespace(**{**vars(os), "fdatasync": fails}))
            with pytest.raises(OSError, match="Input/output error"):
                layer.flush()
        with pytest.raises(OSError, match="an earlier flush failed"):
            layer.write(0, memoryview(b"b" * CLUSTER))
        with pytest.raises(OSError, match="an earlier flush failed"):
            layer.flush()


def test_a_full_filesystem_is_an_error_and_the_layer_goes_on(
    overlay: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Session(overlay) as layer:
        layer.write(0, memoryview(b"a" * CLUSTER))
        with monkeypatch.context() as patched:
            patched.setattr(layer_module, "os", SimpleNamespace(**{**vars(os), "pwritev": full}))
            with pytest.raises(OSError, match="No space left"):
                layer.write(4 * MIB, memoryview(b"b" * 5 * CLUSTER))
        layer.write(4 * MIB, memoryview(b"c" * CLUSTER))
        layer.flush()
    qemu_img("check", overlay)
    qemu_io(overlay, "read -P 97 0 64k", "read -P 99 4M 64k")
