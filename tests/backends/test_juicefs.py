"""References on JuiceFS: what the object storage holds is counted, and each result is read through another mount."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.disks import QemuImg
from support.juicefs import Volume
from support.variants import QEMU_NAMES, Variant, options, self_contained, title
from vmconv import api
from vmconv.backends import juicefs
from vmconv.backends.juicefs import CHUNK, JuiceFSBackend, copied_later
from vmconv.errors import BackendError, PlanError
from vmconv.testing import BackendTests
from vmconv.testing.disks import random_bytes

MIB = 1 << 20
SIZE = 80 * MIB + 512
"""More than a chunk."""
METADATA = 6 * MIB
"""More than any container of such a disk has, with what JuiceFS makes of its metadata when it is read."""


@pytest.fixture(scope="session")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volume]:
    made = Volume(tmp_path_factory.mktemp("juicefs"))
    try:
        made.mount("one")
        made.mount("other")
        yield made
    finally:
        made.close()


@pytest.fixture
def folder(volume: Volume) -> Iterator[Path]:
    """An empty directory of the volume."""
    made = volume.mounts["one"] / "test"
    made.mkdir()
    yield made
    subprocess.run(["rm", "-r", made], check=True)


@pytest.fixture(scope="session")
def disk(volume: Volume) -> Path:
    path = volume.mounts["one"] / "disk.raw"
    with path.open("wb") as file:
        file.write(random_bytes(SIZE))
        os.fsync(file.fileno())
    return path


def elsewhere(volume: Volume, path: Path) -> Path:
    """Returns the same file on the other mount."""
    return volume.mounts["other"] / path.relative_to(volume.mounts["one"])


class TestJuiceFS(BackendTests):
    backend = JuiceFSBackend()
    shares = True

    @pytest.fixture
    def directory(self, folder: Path) -> Iterator[str]:
        yield str(folder)


CHUNKED = [way for way in self_contained() if way[0] in ("parallels", "qcow2", "qed", "raw", "vhdx")]
"""Those whose payload lies as in the source, chunk by chunk."""


@pytest.mark.parametrize("way", self_contained(), ids=title)
def test_a_disk_becomes_any_format_and_back(
    volume: Volume, disk: Path, folder: Path, qemu_img: QemuImg, way: Variant
) -> None:
    """Nothing is added to the objects but metadata, and the other mount sees the same disk."""
    image, back = folder / "image", folder / "back.raw"
    if "streamOptimized" in way[1]:
        pytest.skip("streamOptimized is compressed")
    before = volume.stored()
    plan = api.plan(str(disk), str(image), target_format=way[0], options=options(way))
    # VHD and VMDK may have another last sector.
    assert plan.totals.copied < CHUNK // 1024
    result = api.convert(str(disk), str(image), target_format=way[0], options=options(way))
    assert result.backend == "juicefs"
    assert result.totals.shared > SIZE - CHUNK // 1024
    api.convert(str(image), str(back), source_format=way[0])
    added = volume.stored() - before
    assert added < METADATA if way in CHUNKED else added < METADATA + 2 * CHUNK
    with elsewhere(volume, back).open("rb") as file, disk.open("rb") as wanted:
        assert file.read(SIZE) == wanted.read()
    if (folder / "image-flat.vmdk").exists() or (way[0] == "vmdk" and "flat" in way[1].lower()):
        return
    form = QEMU_NAMES.get(way[0], way[0])
    assert "identical" in str(qemu_img("compare", "-f", "raw", "-F", form, disk, elsewhere(volume, image)))


def test_ranges_at_odd_places_are_referenced(volume: Volume, disk: Path, folder: Path) -> None:
    before = volume.stored()
    cut = folder / "cut.raw"
    result = api.convert(str(disk), str(cut), offset=512 * 3, length=SIZE - 512 * 8)
    assert (result.totals.copied, volume.stored() - before) == (0, 0)
    assert elsewhere(volume, cut).read_bytes() == disk.read_bytes()[512 * 3 : SIZE - 512 * 5]


def test_the_source_and_the_result_are_independent(volume: Volume, folder: Path) -> None:
    source, target = folder / "source.raw", folder / "target.qcow2"
    data = random_bytes(5 * MIB)
    source.write_bytes(data)
    api.convert(str(source), str(target))
    with source.open("r+b") as file:
        file.write(bytes(MIB))
    source.unlink()
    api.convert(str(target), str(folder / "back.raw"))
    assert (folder / "back.raw").read_bytes() == data


def test_calls_may_reference_less_than_they_are_asked_for(
    volume: Volume, disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.copy_file_range

    def short(source: int, target: int, count: int, at: int, to: int) -> int:
        return whole(source, target, min(count, 7 * MIB + 513), at, to)

    monkeypatch.setattr(os, "copy_file_range", short)
    target = folder / "target.vhdx"
    api.convert(str(disk), str(target))
    monkeypatch.undo()
    api.convert(str(target), str(folder / "back.raw"))
    assert (folder / "back.raw").read_bytes()[:SIZE] == disk.read_bytes()


def test_copies_are_noticed(volume: Volume, disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a kernel, or a mount, that copies what it should reference."""

    def copying(source: int, target: int, count: int, at: int, to: int) -> int:
        return os.pwrite(target, os.pread(source, min(count, MIB), at), to)

    monkeypatch.setattr(os, "copy_file_range", copying)
    with pytest.raises(BackendError, match=r"should be referenced, and the mount has uploaded \d+ meanwhile"):
        api.convert(str(disk), str(folder / "target.qcow2"))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [0, 28])
def test_a_call_that_fails_leaves_nothing(
    disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(*_arguments: object) -> int:
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.setattr(os, "copy_file_range", failing)
    with pytest.raises(BackendError, match=r"target\.qcow2: referencing"):
        api.convert(str(disk), str(folder / "target.qcow2"))
    assert list(folder.iterdir()) == []


def test_other_filesystems_and_mounts_are_told(volume: Volume, disk: Path, tmp_path: Path, folder: Path) -> None:
    assert "is not JuiceFS" in str(JuiceFSBackend().capabilities(str(tmp_path)).reason)
    with pytest.raises(PlanError, match="is not JuiceFS"):
        api.plan(str(disk), str(tmp_path / "target.qcow2"), backend="juicefs")
    plan = api.plan(str(elsewhere(volume, disk)), str(folder / "target.qcow2"), backend="juicefs")
    assert [reason.reason for reason in plan.copies] == [f"disk.raw is not on the same mount as {folder}"]


def test_a_mount_that_does_not_tell_is_not_believed(disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a mount that is bound elsewhere has no statistics."""
    monkeypatch.setattr(juicefs, "STATISTICS", ".nothing")
    plan = api.plan(str(disk), str(folder / "target.qcow2"), backend="auto")
    assert plan.backend == "copy"
    assert "does not tell there what it uploads" in str(JuiceFSBackend().capabilities(str(folder)).reason)


def test_the_plan_tells_what_is_copied_later(disk: Path, folder: Path) -> None:
    """The bitmaps of a dynamic VHD are between its blocks of 2 MiB."""
    quiet = api.plan(str(disk), str(folder / "target.qcow2"))
    assert (copied_later(quiet), quiet.notes) == (0, ())
    torn = api.plan(str(disk), str(folder / "target.vhd"), options={"subformat": "dynamic"})
    assert copied_later(torn) == 2
    assert "copies at least 2 chunks of 64 MiB" in torn.notes[0]


def test_a_client_that_is_killed_leaves_nothing_that_the_next_run_does_not_end(disk: Path, folder: Path) -> None:
    target = folder / "target.qcow2"
    code = (
        "import os, sys, time; from vmconv import api\n"
        "os.copy_file_range = lambda *_: (print('now', flush=True), time.sleep(60))[0]\n"
        "api.convert(*sys.argv[1:])"
    )
    with subprocess.Popen([sys.executable, "-c", code, disk, target], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"now\n"
        run.kill()
    assert not target.exists()
    assert len(list(folder.iterdir())) == 1
    deadline = time.monotonic() + 60
    # The mount keeps the lock of the dead run for a moment.
    while len(list(folder.iterdir())) > 1 or not target.exists():
        assert time.monotonic() < deadline
        api.convert(str(disk), str(target), force=True)
        time.sleep(0.2)


def test_a_mount_that_dies_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata are transactions: after another mount there is no target, and a run makes one."""
    own = Volume(tmp_path)
    try:
        point = own.mount("dying")
        data = random_bytes(3 * MIB)
        (point / "disk.raw").write_bytes(data)
        whole = os.copy_file_range

        def dying(*arguments: int) -> int:
            own.kill("dying")
            return whole(*arguments)

        monkeypatch.setattr(os, "copy_file_range", dying)
        with pytest.raises(BackendError):
            api.convert(str(point / "disk.raw"), str(point / "target.qcow2"))
        monkeypatch.undo()
        own.unmount("dying")
        point = own.mount("again")
        assert not (point / "target.qcow2").exists()
        api.convert(str(point / "disk.raw"), str(point / "target.qcow2"))
        api.convert(str(point / "target.qcow2"), str(point / "back.raw"))
        assert (point / "back.raw").read_bytes() == data
    finally:
        own.close()
