"""A start on a full disk waits for room."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.requirements import missing
from vmconv.plugin import VmconvError
from vmconv_fleet.node.lock import running
from vmconv_fleet.node.room import wait_for_room
from vmconv_fleet.testing import PATIENCE, Driven, Lab, wait_until

FULL = OSError(errno.ENOSPC, "No space left on device")


def answers(monkeypatch: pytest.MonkeyPatch, *found: OSError | None) -> list[OSError | None]:
    """Lets the filesystem answer so, one after the other; returns the answers that are left."""
    left = list(found)

    def allocate(descriptor: int, offset: int, size: int) -> None:
        assert (offset, size) == (0, 1 << 20)
        assert os.fstat(descriptor).st_mode & 0o777 == 0o600
        if (error := left.pop(0)) is not None:
            raise error

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    return left


def no_event(_timeout: float) -> None:
    return None


def test_it_waits_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = answers(monkeypatch, FULL, FULL, OSError(errno.EDQUOT, "Disk quota exceeded"), None)
    waited: list[float] = []
    assert wait_for_room(str(tmp_path), waited.append)
    assert left == []
    assert waited == [2.0, 2.0]
    assert f"{tmp_path}: no room on the disk: the node starts once 1024 KiB are free" in caplog.text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT])
def test_a_filesystem_without_nameless_files_is_asked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, flags_seen = os.open, []

    def without(path: str, flags: int, *rest: int, **more: int) -> int:
        flags_seen.append(flags & os.O_TMPFILE == os.O_TMPFILE)
        if flags_seen[-1]:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", without)
    assert wait_for_room(str(tmp_path), no_event)
    assert (flags_seen[0], flags_seen[-1]) == (True, False)
    assert os.listdir(tmp_path) == []


def test_no_inode_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise FULL

    monkeypatch.setattr(os, "open", fails)
    assert not wait_for_room(str(tmp_path), lambda _timeout: signal.SIGTERM)


def test_a_signal_ends_the_wait_and_a_reload_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, *[FULL] * 9)
    events = [signal.SIGHUP, signal.SIGTERM]
    assert not wait_for_room(str(tmp_path), lambda _timeout: events.pop(0))
    assert events == []


def test_another_failure_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(VmconvError, match="Input/output"):
        wait_for_room(str(tmp_path), no_event)


def filled(directory: Path) -> Path:
    """Fills the filesystem and returns the file that does."""
    filler = directory / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as exc:
            assert exc.errno == errno.ENOSPC
    return filler


def test_a_node_starts_once_its_disk_has_room(
    lab: Lab, drive: Callable[..., Driven], request: pytest.FixtureRequest
) -> None:
    config = lab.add()
    directory = Path(config.directory)
    kept = directory.rename(f"{directory}.kept")
    directory.mkdir(0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        missing("namespaces", "tmpfs cannot be mounted")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", directory], check=True))
    shutil.copytree(kept, directory, dirs_exist_ok=True)
    # The log is not on the disk that is full.
    os.symlink(f"{directory}.log", directory / "log")
    filler = filled(directory)
    node = Driven(config)
    request.addfinalizer(node.kill)
    wait_until(lambda: "no room on the disk" in node.log(), PATIENCE, "it says that its disk is full")
    assert (node.process.poll(), running(config)) == (None, None)
    filler.unlink()
    assert node.answer() == {"ready": True}
    wait_until(lambda: node.ask("state")["serving"], PATIENCE, "it serves")
    assert running(config) == node.process.pid
