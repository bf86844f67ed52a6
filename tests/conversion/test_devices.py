"""`vmconv convert -n` into a block device: its content is the image, or it does not look like a disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.loops import loop_device
from vmconv.backends.device import HEAD, DeviceOutput
from vmconv.cli.main import main
from vmconv.errors import AccessError, BackendError, PlanError, UsageError, VerifyError
from vmconv.model.sources import File
from vmconv.system import linux

SIZE = 24 * MIB
BEHIND = 8 * MIB + 512


@pytest.fixture
def source(tmp_path: Path, qemu_img: QemuImg) -> Path:
    """A qcow2 whose payload, holes and zeros begin and end inside and outside of the head, and at odd sectors."""
    path = tmp_path / "source.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE - 512))
    for what in ("-P 1 0 300k", "-P 2 900k 3M", "-z 2M 128k", "-P 3 10000k 512", "-P 4 12M 5M", "-P 5 24575k 512"):
        qemu_io(path, f"write {what}")
    return path


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """The file of the device: full of bytes that are not the source's."""
    path = tmp_path / "device.img"
    path.write_bytes(b"\xee" * (SIZE - 512 + BEHIND))
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[Path]:
    with loop_device(backing) as path:
        yield path


def raw_of(source: Path, qemu_img: QemuImg) -> bytes:
    wanted = source.with_name("wanted.raw")
    qemu_img("convert", "-O", "raw", source, wanted)
    return wanted.read_bytes()


def content(device: Path, length: int = -1) -> bytes:
    with device.open("rb") as file:
        return file.read(length)


def convert(source: Path, device: Path, target_format: str = "raw", **given: Any) -> vmconv.Result:
    return vmconv.convert(source, device, target_format=target_format, no_create=True, **given)


@pytest.mark.parametrize("verify", [False, "metadata", "sample", "bytes"])
@pytest.mark.parametrize("cache", ["writeback", "unsafe"])
def test_a_device_gets_the_disk_and_keeps_what_is_behind_it(
    source: Path, device: Path, backing: Path, qemu_img: QemuImg, verify: Any, cache: Any
) -> None:
    result = convert(source, device, verify=verify, cache=cache)
    subprocess.run(["blockdev", "--flushbufs", str(device)], check=True)
    there = backing.read_bytes()
    assert there[: SIZE - 512] == raw_of(source, qemu_img)
    assert there[SIZE - 512 :] == b"\xee" * BEHIND
    assert result.backend == "device"


def test_zeros_are_freed_where_the_device_can(source: Path, device: Path, backing: Path) -> None:
    os.sync()
    before = backing.stat().st_blocks
    convert(source, device)
    assert (before - backing.stat().st_blocks) * 512 > 10 * MIB


@pytest.mark.parametrize("refused", [1, 2])
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM])
def test_a_device_that_does_not_free_or_zero_is_written(
    source: Path, device: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch, refused: int, number: int
) -> None:
    real, calls = linux.zero_device, []

    def zero(descriptor: int, offset: int, length: int, *, free: bool) -> None:
        calls.append(free)
        if free or refused == 2:
            raise OSError(number, os.strerror(number))
        real(descriptor, offset, length, free=free)

    monkeypatch.setattr(linux, "zero_device", zero)
    convert(source, device)
    assert content(device, SIZE - 512) == raw_of(source, qemu_img)
    # A way that was refused is not tried again.
    assert calls.count(True) == 1
    assert refused == 1 or len(calls) == 2


def test_an_error_of_zeroing_ends_the_run_without_a_disk(
    source: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, free: bool) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(linux, "zero_device", fail)
    with pytest.raises(BackendError, match="Input/output error") as caught:
        convert(source, device)
    assert caught.value.hint == f"{device} holds no disk now: its first bytes are zero"
    assert content(device, HEAD) == bytes(HEAD)


def test_a_device_said_to_be_zero_is_read_and_zeroed_where_it_is_not(
    source: Path, device: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch
) -> None:
    with device.open("r+b") as file:
        file.write(bytes(SIZE))
        file.seek(20 * MIB + 4096)
        file.write(b"old")
    real, zeroed = linux.zero_device, []

    def zero(descriptor: int, offset: int, length: int, *, free: bool) -> None:
        zeroed.append((offset, length))
        real(descriptor, offset, length, free=free)

    monkeypatch.setattr(linux, "zero_device", zero)
    convert(source, device, target_is_zero=True)
    assert content(device, SIZE - 512) == raw_of(source, qemu_img)
    ((offset, length),) = zeroed
    assert offset <= 20 * MIB + 4096 < offset + length <= offset + MIB


@pytest.mark.parametrize("name", ["qcow2", "vhdx", "vdi", "vmdk", "qed", "parallels"])
def test_containers_on_a_larger_device_are_read_by_qemu(
    source: Path, device: Path, qemu_img: QemuImg, name: str
) -> None:
    convert(source, device, name, verify="bytes")
    qemu_img("compare", "-f", "qcow2", "-F", name, source, device)
    assert vmconv.compare(source, device, right_format=name)


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_a_format_with_a_footer_is_refused_on_a_device_of_any_size(
    source: Path, device: Path, tmp_path: Path, subformat: str
) -> None:
    given: dict[str, Any] = {"target_format": "vhd", "options": {"subformat": subformat}}
    # The footer is written before the head: an interrupted run would leave a disk.
    refused(source, device, PlanError, "would look complete before it is", **given)
    exact = tmp_path / "exact.img"
    exact.write_bytes(b"\xee" * vmconv.plan(source, tmp_path / "disk.vhd", **given).files[0].size)
    with loop_device(exact) as fitting:
        refused(source, fitting, PlanError, "would look complete before it is", **given)


def test_a_format_that_looks_for_its_end_needs_a_device_of_its_size(source: Path, device: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"target_format": "vmdk", "options": {"subformat": "streamOptimized"}}
    refused(source, device, PlanError, "bytes behind the image, where vmdk looks for the end of a file", **given)
    vmconv.convert(source, tmp_path / "disk.vmdk", **given)
    exact = tmp_path / "exact.img"
    exact.write_bytes(b"\xee" * (tmp_path / "disk.vmdk").stat().st_size)
    with loop_device(exact) as fitting:
        convert(source, fitting, verify="bytes", **given)
        assert vmconv.compare(source, fitting, right_format="vmdk")


# Where the head is not the last


@pytest.mark.parametrize("at", ["copy", "zero", "finish", "verify"])
def test_a_run_killed_at_any_step_leaves_no_disk(source: Path, device: Path, at: str) -> None:
    owner = "vmconv.conversion.execute.refuse_changed" if at == "verify" else f"DeviceOutput.{at}"
    script = f"""
import os, vmconv, vmconv.conversion.execute
from vmconv.backends.device import DeviceOutput
{owner} = lambda *given: os.kill(os.getpid(), 9)
vmconv.convert({str(source)!r}, {str(device)!r}, target_format="raw", no_create=True)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content(device, HEAD) == bytes(HEAD)
    convert(source, device, verify="bytes")


def test_interrupting_says_what_is_on_the_device(source: Path, device: Path) -> None:
    script = f"""
import os, signal, sys
from vmconv.backends.device import DeviceOutput
from vmconv.cli.main import main
DeviceOutput.finish = lambda *given: os.kill(os.getpid(), signal.SIGINT)
sys.exit(main(["convert", {str(source)!r}, {str(device)!r}, "-n", "-O", "raw"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == (
        f"vmconv: interrupted, {device} holds no disk now: its first bytes are zero"
    )


def test_a_difference_found_by_verifying_leaves_no_disk(
    source: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DeviceOutput.finish

    def damaged(output: DeviceOutput) -> File:
        os.pwrite(output.descriptor, b"wrong", 14 * MIB)
        return real(output)

    monkeypatch.setattr(DeviceOutput, "finish", damaged)
    with pytest.raises(VerifyError, match="differs from the source at guest address 0xe00000") as caught:
        convert(source, device, verify="bytes")
    assert "holds no disk now" in str(caught.value.hint)
    assert content(device, HEAD) == bytes(HEAD)


def test_a_head_that_reads_differently_is_no_success(
    source: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(output: DeviceOutput, head: bytes) -> None:
        os.pwrite(output.descriptor, head[:512], 0)

    monkeypatch.setattr(DeviceOutput, "_write_head", half)
    with pytest.raises(VerifyError, match="its first 1048576 bytes are not those that were written"):
        convert(source, device)


# Refused before anything is written


def refused(source: Path, device: Path, error: type[Exception], words: str, **given: Any) -> None:
    before = content(device)
    with pytest.raises(error, match=words):
        convert(source, device, **given)
    assert content(device) == before


def test_a_device_that_is_mounted_is_refused(tmp_path: Path, source: Path, device: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True)
    point = tmp_path / "mounted"
    point.mkdir()
    subprocess.run(["mount", str(device), str(point)], check=True)
    try:
        with pytest.raises(AccessError, match=f"is in use: mounted at {point}"):
            convert(source, device)
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_device_with_a_loop_device_on_it_is_refused(source: Path, device: Path) -> None:
    with loop_device(device) as upper:
        refused(source, device, AccessError, f"is in use as {upper}")


def test_the_second_loop_device_of_a_file_is_refused(source: Path, device: Path, backing: Path) -> None:
    with loop_device(backing) as other:
        refused(source, device, AccessError, f"is in use as {other}")


def test_a_device_open_in_qemu_is_refused(source: Path, device: Path) -> None:
    with subprocess.Popen(["qemu-io", "-f", "raw", str(device)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin
        assert user.stdout
        user.stdin.write(b"read 0 512\n")
        user.stdin.flush()
        user.stdout.readline()
        refused(source, device, AccessError, "is open in another process")
        user.stdin.close()


def test_a_read_only_device_is_refused(source: Path, backing: Path) -> None:
    with loop_device(backing, "--read-only") as device:
        refused(source, device, AccessError, "is read-only")


def test_a_smaller_device_is_refused(source: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.img"
    small.write_bytes(b"\xee" * (SIZE - 1024))
    with loop_device(small) as device:
        refused(source, device, PlanError, f"has {SIZE - 1024} bytes, and the image needs {SIZE - 512}")


def test_a_device_is_not_written_from_itself_or_from_its_own_file(device: Path, backing: Path) -> None:
    for source in (device, backing):
        refused(source, device, PlanError, "is part of the source", source_format="raw")


@contextmanager
def partitions(whole: Path) -> Iterator[tuple[Path, Path]]:
    """Yields the first two partitions of a loop device, made by the program: kernels may not read the table."""
    subprocess.run(["partx", "--add", str(whole)], check=True)
    try:
        yield whole.with_name(f"{whole.name}p1"), whole.with_name(f"{whole.name}p2")
    finally:
        subprocess.run(["partx", "--delete", str(whole)], check=True)


def test_a_partition_is_not_written_from_its_disk_nor_the_disk_from_it(tmp_path: Path, source: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", 64 * MIB)
    table = "label: gpt\nstart=2048, size=40960\nstart=43008, size=60000\n"
    subprocess.run(["sfdisk", "-q", str(disk)], input=table, text=True, check=True)
    with loop_device(disk) as whole, partitions(whole) as (first, second):
        for one, other in ((whole, first), (first, whole)):
            with pytest.raises(PlanError, match="is part of the source"):
                convert(one, other, source_format="raw")
        convert(source, second, verify="bytes")
        convert(first, second, source_format="raw", verify="bytes")
        assert content(second, 40960 * 512) == content(first)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"options": {"subformat": "monolithicFlat"}, "target_format": "vmdk"}, PlanError, "more than the one device"),
        ({"in_place": True}, UsageError, "--in-place does not apply"),
        ({"chain": True}, UsageError, "--chain does not apply"),
        ({"mode": 0o600}, UsageError, "--mode does not apply"),
        ({"backend": "copy"}, UsageError, "the backend copy does not apply"),
        ({"backing_file": "base.qcow2"}, UsageError, "a backing file does not apply"),
        ({"target_format": None}, UsageError, "no suffix that names a format"),
        ({"zero_copy": "require"}, vmconv.ZeroCopyError, "is a block device, which shares nothing"),
        ({"no_create": False}, PlanError, "is a block device"),
        ({"no_create": False, "target_is_zero": True}, UsageError, "--target-is-zero is for -n"),
        ({"verify": "qemu"}, UsageError, "--verify=qemu"),
    ],
)
def test_what_does_not_apply_is_refused(
    source: Path, device: Path, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    before = content(device)
    with pytest.raises(error, match=words):
        vmconv.convert(source, device, **{"target_format": "raw", "no_create": True, **given})
    assert content(device) == before


def test_n_needs_a_device(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        convert(source, tmp_path / "nothing")
    with pytest.raises(PlanError, match=r"nothing\.qcow2: does not exist"):
        vmconv.convert(source, tmp_path / "nothing.qcow2", no_create=True)


# What the user is told


def test_the_plan_says_what_is_written_zeroed_and_behind(
    source: Path, device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(device)
    assert main(["plan", str(source), str(device), "-n", "-O", "raw", "--output", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["notes"] == [
        f"the content of {device} is lost: {plan['copied']} bytes are written, {plan['zero']} bytes are zeroed, and "
        "freed if the device can",
        f"{device} has {BEHIND} bytes behind the image, which stay as they are",
    ]
    assert plan["copied"] + plan["zero"] == SIZE - 512
    assert content(device) == before


def test_progress_counts_zeroed_bytes_too(source: Path, device: Path) -> None:
    seen: list[tuple[int, int]] = []
    plans: list[vmconv.Plan] = []
    convert(source, device, progress=lambda done, total: seen.append((done, total)), announce=plans.append)
    totals = plans[0].totals
    assert seen[0] == (0, totals.copied + totals.zero)
    assert seen[-1] == (SIZE - 512, SIZE - 512)
