"""References on JuiceFS: what the object storage holds is counted, and each result is read through another mount."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.disks import QemuImg
from support.juicefs import ENGINES, Engine, Range, Volume
from support.variants import QEMU_NAMES, Variant, options, self_contained, title
from vmconv import api
from vmconv.api import Request, prepared
from vmconv.backends.juicefs import CHUNK, JuiceFSBackend, copied_later
from vmconv.errors import BackendError, PlanError
from vmconv.io.registry import installed
from vmconv.system import juicefs, linux
from vmconv.system.juicefs import bytes_sent, volume_of
from vmconv.system.linux import mount_of
from vmconv.testing import BackendTests
from vmconv.testing.disks import random_bytes

MIB = 1 << 20
SIZE = 80 * MIB + 512
"""More than a chunk."""
METADATA = 6 * MIB
"""More than any container of such a disk has, with what JuiceFS makes of its metadata when it is read."""


@pytest.fixture(scope="session", params=ENGINES)
def volume(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Volume]:
    made = Volume(tmp_path_factory.mktemp("juicefs"), request.param)
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
    before = volume.names()
    plan = api.plan(str(disk), str(image), target_format=way[0], options=options(way))
    # VHD and VMDK may have another last sector.
    assert plan.totals.copied < CHUNK // 1024
    result = api.convert(str(disk), str(image), target_format=way[0], options=options(way))
    assert result.backend == "juicefs"
    assert result.totals.shared > SIZE - CHUNK // 1024
    api.convert(str(image), str(back), source_format=way[0])
    added = volume.added(before)
    assert added < METADATA if way in CHUNKED else added < METADATA + 2 * CHUNK
    with elsewhere(volume, back).open("rb") as file, disk.open("rb") as wanted:
        assert file.read(SIZE) == wanted.read()
    if (folder / "image-flat.vmdk").exists() or (way[0] == "vmdk" and "flat" in way[1].lower()):
        return
    form = QEMU_NAMES.get(way[0], way[0])
    assert "identical" in str(qemu_img("compare", "-f", "raw", "-F", form, disk, elsewhere(volume, image)))


FORMATS = sorted(name for name, one in installed().formats.items() if one.can_read and one.can_write)


@pytest.fixture(scope="session", params=FORMATS)
def image(volume: Volume, disk: Path, request: pytest.FixtureRequest) -> Path:
    """The disk in one of the formats that are written, in chunks of one range, so that no mount copies them."""
    path = volume.mounts["one"] / f"disk.{request.param}"
    if not path.exists():
        api.convert(str(disk), str(path), target_format=request.param)
    volume.settle(path)
    return path


@pytest.mark.parametrize("volume", ["redis"], indirect=True)
@pytest.mark.parametrize("target_format", FORMATS)
def test_no_pair_adds_payload(
    volume: Volume, image: Path, disk: Path, folder: Path, qemu_img: QemuImg, target_format: str
) -> None:
    """When all ranges are referenced there is no new object. Metadata comes later, and so does what JuiceFS copies."""
    target, before, new = folder / "target", volume.names(), set()
    result = api.convert(
        str(image),
        str(target),
        source_format=image.suffix[1:],
        target_format=target_format,
        created=lambda *_: new.update(volume.names() - before),
    )
    assert (result.backend, result.totals.copied, new) == ("juicefs", 0, set())
    assert result.totals.shared >= SIZE
    form = QEMU_NAMES.get(target_format, target_format)
    assert "identical" in str(qemu_img("compare", "-f", "raw", "-F", form, disk, elsewhere(volume, target)))
    volume.settle(target)


def test_an_empty_disk_needs_no_copies(folder: Path) -> None:
    empty = folder / "empty.qcow2"
    api.create(str(empty), size=MIB)
    assert api.convert(str(empty), str(folder / "empty.vhdx")).backend == "juicefs"


def test_ranges_at_odd_places_are_referenced(volume: Volume, disk: Path, folder: Path) -> None:
    cut = folder / "cut.raw"
    result = api.convert(str(disk), str(cut), offset=512 * 3, length=SIZE - 512 * 8)
    slices = {found.slice for found in volume.ranges(cut)}
    assert result.totals.copied == 0
    assert slices and slices <= {found.slice for found in volume.ranges(disk)}
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
    with pytest.raises(BackendError, match=r"should be referenced, and the mount has sent \d+ meanwhile"):
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
    monkeypatch.setattr(juicefs, "_PREFIXES", (".nothing-",))
    plan = api.plan(str(disk), str(folder / "target.qcow2"), backend="auto")
    assert plan.backend == "copy"
    assert "does not tell there what it sends" in str(JuiceFSBackend().capabilities(str(folder)).reason)


def test_files_that_only_have_the_names_are_not_believed(volume: Volume) -> None:
    """Where JuiceFS has its own files under other names, whoever may write at the root can make these."""
    point = volume.mount("prefixed", "--prefix-internal")
    try:
        mount = mount_of(str(point))
        told, known = bytes_sent(mount), volume_of(mount)
        assert told is not None
        assert known is not None
        assert known == volume_of(mount_of(str(volume.mounts["one"])))
        (point / ".stats").write_text("juicefs_object_request_data_bytes_PUT 1000000\n")
        (point / ".config").write_text(
            '{"Format": {"UUID": "%s"}, "Meta": {"Subdir": ""}}' % ("0" * 8 + known.uuid[8:])
        )
        assert bytes_sent(mount) != (1000000, 0)
        assert volume_of(mount) == known
    finally:
        for name in (".stats", ".config"):
            (point / name).unlink(missing_ok=True)
        volume.unmount("prefixed")


def test_a_mount_that_uploads_later_notices_copies_too(
    volume: Volume, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = volume.mount("later", "--writeback", "--upload-delay", "1h")
    try:
        source, target = point / disk.name, point / "target.qcow2"
        assert api.convert(str(source), str(target)).totals.copied == 0
        target.unlink()
        copying = lambda a, b, count, at, to: os.pwrite(b, os.pread(a, min(count, MIB), at), to)  # noqa: E731
        monkeypatch.setattr(os, "copy_file_range", copying)
        with pytest.raises(BackendError, match=r"the mount has sent \d+ meanwhile"):
            api.convert(str(source), str(target))
    finally:
        volume.unmount("later")


@pytest.mark.parametrize("kind", ["ceph", "fuse.glusterfs", "fuse.mfs", "fuse.seaweedfs", "nfs4", "cifs", "lustre"])
def test_the_same_call_elsewhere_is_never_taken_for_sharing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On these, copy_file_range copies, at the client or on servers."""
    source = tmp_path / "disk.raw"
    source.write_bytes(random_bytes(MIB))
    monkeypatch.setattr(linux, "mount_of", lambda _path: linux.Mount(kind, str(tmp_path), "/", "server"))
    plan = api.plan(str(source), str(tmp_path / "disk.qcow2"))
    assert (plan.backend, plan.totals.shared) == ("copy", 0)
    assert api.convert(str(source), str(tmp_path / "disk.qcow2")).totals.copied == MIB


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


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mount_that_dies_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Its metadata are transactions: after another mount there is no target, and a run makes one."""
    own = Volume(tmp_path, engine)
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


def test_the_simulator_of_scale_counts_as_juicefs_does(
    volume: Volume, disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`benchmarks/scale.py`: the calls, and the ranges of all chunks, for clusters in random order."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    images, scale = importlib.import_module("images"), importlib.import_module("scale")
    source, target = folder / "source.qcow2", folder / "target.raw"
    images.qcow2(str(source), str(disk), images.shuffled(SIZE // images.CLUSTER))
    volume.settle(source)
    calls: list[int] = []
    ranges: list[Range] = []
    whole = os.copy_file_range

    def counted(source: int, target: int, count: int, at: int, to: int) -> int:
        calls.append(count)
        return whole(source, target, count, at, to)

    def made(_name: str, descriptor: int) -> None:
        ranges.extend(volume.ranges(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    with prepared(Request(str(source), str(target))) as ready:
        load = scale.load_of(ready.plan, ready.image.flat)
    monkeypatch.setattr(os, "copy_file_range", counted)
    api.convert(str(source), str(target), created=made)
    assert load.calls == len(calls) > 1000
    assert load.slices == len(ranges)
    assert load.chunks == len({found.chunk for found in ranges})
    assert load.worst == max(Counter(found.chunk for found in ranges).values())
    assert load.shared == sum(found.length for found in ranges)
