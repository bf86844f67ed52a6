"""`vmconv convert SOURCE -`: what comes out of the pipe is what a file would have been."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.variants import Variant, identified, title, variants
from vmconv.cli.main import main
from vmconv.errors import PlanError, UsageError, VerifyError, ZeroCopyError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

SIZE = 12 * MIB
PROGRAM = [sys.executable, "-m", "vmconv"]


def streamed(source: Path, *flags: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, "convert", str(source), "-", *flags], capture_output=True, check=False)


@contextmanager
def begun(raw: Path) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
    """Yields a stream of a raw disk to a pipe whose first bytes were read: the program, its output and its errors."""
    command = [*PROGRAM, "convert", "-q", str(raw), "-", "-O", "raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1000)
        yield process, process.stdout, process.stderr


def is_one_file(variant: Variant) -> bool:
    return not any(part in variant[1] for part in ("Flat", "twoGb", "vmfs", "reference"))


@pytest.mark.parametrize("variant", [v for v in variants() if is_one_file(v)], ids=title)
def test_a_stream_is_the_file_that_convert_makes(xfs_dir: Path, qemu_img: QemuImg, variant: Variant) -> None:
    name = variant[0]
    given = ",".join(f"{key}={value}" for key, value in identified(variant).items())
    raw = make_disk(xfs_dir / "source.raw", SIZE)
    image = xfs_dir / "disk.vmdk"
    vmconv.convert(str(raw), str(image))
    (xfs_dir / "made").mkdir()
    target = xfs_dir / "made" / f"disk{installed().formats[name].suffixes[0]}"
    vmconv.convert(str(image), str(target), target_format=name, options=identified(variant))
    done = streamed(image, "-O", name, *(["-o", given] if given else []))
    assert done.returncode == 0, done.stderr
    assert done.stdout == target.read_bytes()
    said = done.stderr.decode().splitlines()
    assert said[0] == f"{target.name}: {target.stat().st_size} bytes"
    assert said[-1].startswith("-: shared 0 B, copied ")


def test_chains_snapshots_and_compressed_clusters_can_be_streamed(xfs_dir: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(xfs_dir / "disk.raw", SIZE)
    qemu_img("convert", "-c", "-O", "qcow2", raw, xfs_dir / "base.qcow2")
    qemu_img("snapshot", "-c", "before", xfs_dir / "base.qcow2")
    qemu_io(xfs_dir / "base.qcow2", "write -P 1 5M 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", xfs_dir / "top.qcow2")
    qemu_io(xfs_dir / "top.qcow2", "write -P 2 6M 1M")
    content = raw.read_bytes()
    assert streamed(xfs_dir / "base.qcow2", "-O", "raw", "--snapshot", "before").stdout == content
    wanted = content[: 5 * MIB] + b"\1" * MIB + b"\2" * MIB + content[7 * MIB :]
    assert streamed(xfs_dir / "top.qcow2", "-O", "raw").stdout == wanted


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_standard_output_may_be_a_file(tmp_path: Path, mode: str) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    with (tmp_path / "out").open(mode) as out:
        out.write(b"before")
        out.flush()
        subprocess.run([*PROGRAM, "convert", "-q", str(raw), "-", "-O", "raw"], stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == b"before" + raw.read_bytes()


def test_the_size_is_known_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    assert main(["plan", str(raw), "-", "-O", "vhd", "-o", "subformat=fixed", "--output", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(file["name"], file["size"]) for file in plan["files"]] == [("disk.vhd", SIZE + 512)]
    assert plan["backend"] == "stream"
    assert plan["shared"] == 0
    assert [copy["reason"] for copy in plan["copies"]] == ["a stream cannot share blocks with files"]


def test_events_go_to_standard_error(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    done = streamed(raw, "-O", "raw", "--output", "json")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["plan", "result"]
    assert events[0]["files"][0]["size"] == SIZE
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == SIZE
    assert done.stdout == raw.read_bytes()


def test_quiet_says_nothing(tmp_path: Path) -> None:
    done = streamed(make_disk(tmp_path / "disk.raw", MIB), "-O", "qcow2", "-q")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_closed_pipe_ends_the_stream_silently(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", 64 * MIB)
    with begun(raw) as (process, out, err):
        out.close()
        assert process.wait(timeout=600) == 1
        assert err.read() == b""


def test_a_pipe_closed_before_the_end_is_noticed(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", 32 * 1024)
    reader, writer = os.pipe()
    threading.Timer(0.3, os.close, [reader]).start()
    with pytest.raises(BrokenPipeError):
        vmconv.stream(str(raw), writer, "raw")
    os.close(writer)


def test_it_ends_when_everything_was_read(tmp_path: Path) -> None:
    # It fits into the pipe as a whole; but what is there are pages of the file, which may still change.
    raw = make_disk(tmp_path / "disk.raw", 32 * 1024)
    reader, writer = os.pipe()
    ended = threading.Event()

    def run() -> None:
        vmconv.stream(str(raw), writer, "raw")
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert not ended.wait(0.5)
    assert os.read(reader, 1 << 20) == raw.read_bytes()
    assert ended.wait(600)
    thread.join()
    os.close(reader)
    os.close(writer)


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", 64 * MIB)
    with begun(raw) as (process, out, err):
        before = raw.stat().st_ctime_ns
        # Timestamps of a file may be as coarse as the system's clock.
        while raw.stat().st_ctime_ns == before:
            with raw.open("r+b") as file:
                file.write(b"changed")
        out.read()
        assert process.wait(timeout=600) == 1
        assert b"disk.raw: changed while it was being viewed" in err.read()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([], UsageError, "no suffix that names a format"),
        (["-O", "vmdk", "-o", "subformat=monolithicFlat"], PlanError, "vmdk would be 2 files, and a stream is one"),
        (["-O", "vmdk", "-o", "subformat=reference"], PlanError, "vmdk would refer to the source's files"),
        (["-O", "qcow2", "-o", "subformat=reference"], PlanError, "qcow2 would refer to the source's files"),
        (["-O", "qcow2", "-o", "data_file=disk.raw"], PlanError, "qcow2 would refer to the source's files"),
        (["-O", "qcow2", "-B", "base.qcow2"], UsageError, "a backing file does not apply"),
        (["-O", "qcow2", "--chain"], UsageError, "a chain does not apply"),
        (["-O", "qcow2", "--backend", "copy"], UsageError, "the backend copy does not apply"),
        (["-O", "qcow2", "--zero-copy=require"], ZeroCopyError, "a stream cannot share blocks with files"),
    ],
    ids=["format", "files", "extents", "parent", "data-file", "backing", "chain", "backend", "zero-copy"],
)
def test_impossible_streams_are_refused_before_a_byte_is_sent(
    tmp_path: Path, flags: list[str], error: type[vmconv.VmconvError], message: str
) -> None:
    done = streamed(make_disk(tmp_path / "disk.raw", MIB), *flags)
    assert done.stdout == b""
    assert message in done.stderr.decode()
    assert done.returncode == error.exit_code


def test_a_stream_to_a_full_device_names_standard_output(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", MIB)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vmconv", "convert", "-O", "qcow2", str(disk), "-"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert b"standard output: cannot be written: No space left on device" in done.stderr


def test_a_terminal_is_spared(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    master, slave = pty.openpty()
    command = [*PROGRAM, "convert", str(raw), "-", "-O", "raw"]
    done = subprocess.run(command, stdout=slave, stderr=subprocess.PIPE, check=False)
    os.close(slave)
    os.close(master)
    assert done.returncode == 2
    assert b"standard output is a terminal" in done.stderr


def test_a_wrong_layout_is_found_before_a_byte_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    other = make_disk(tmp_path / "other.raw", SIZE, seed=1)
    vmdk = installed().formats["vmdk"]
    write = vmdk.write

    with Opener(installed()) as opener:
        wrong = opener.image(str(other))
        monkeypatch.setattr(vmdk, "write", lambda _image, *how, **_backing: write(wrong, *how))
        reader, writer = os.pipe()
        with pytest.raises(VerifyError, match="differs from the source at guest address"):
            vmconv.stream(str(raw), writer, "vmdk")
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_an_interrupted_stream_is_not_reported_as_nothing_created(xfs_dir: Path) -> None:
    disk = make_disk(xfs_dir / "disk.raw", MIB)

    def interrupt(_done: int, _to_do: int) -> None:
        raise KeyboardInterrupt

    with (xfs_dir / "out").open("wb") as out, pytest.raises(KeyboardInterrupt) as caught:
        vmconv.stream(str(disk), out.fileno(), "raw", progress=interrupt)
    assert not hasattr(caught.value, "results")
    assert (xfs_dir / "out").stat().st_size
