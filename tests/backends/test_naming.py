"""Several files are named as one: stopped at any call, all are there after the next run, or none."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support import qcow2_images
from support.crash import Stopped
from support.disks import MIB, make_disk
from support.tried import TRIED
from vmconv import api
from vmconv.backends import naming
from vmconv.backends.temporary import Temporary, remove_stale, temporary_name
from vmconv.errors import AccessError, BackendError, VmconvError
from vmconv.io.directory import Directory

CALLS = ("create", "create_unnamed", "link", "link_open", "rename", "unlink", "sync")
OTHER_CALLS = ("pwrite", "fsync", "fchmod")
OLD = b"what was here before"


class Stopper:
    """Ends a run before call number `at` to storage, and every later one: the process is dead."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: OSError | None = None) -> None:
        self.at, self.made, self.dead, self.error = at, 0, False, error
        for owner, names in ((Directory, CALLS), (os, OTHER_CALLS)):
            for name in names:
                patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if self.error is not None:
                self.made += 1
                if self.made == self.at + 1:
                    raise self.error
                return real(*arguments, **more)
            if self.dead or self.made == self.at:
                self.dead = True
                raise Stopped
            self.made += 1
            return real(*arguments, **more)

        return call


class Work(NamedTuple):
    """What is made: by `run` in a directory; `targets` are the names of all files, what the user named last."""

    run: Callable[[Path], object]
    targets: tuple[str, ...]
    named: str


def fan_out(directory: Path) -> object:
    return api.fanout(str(directory / "disk.raw"), ["qcow2", "vmdk", "vdi"], directory=str(directory))


def split(directory: Path) -> object:
    options = {"subformat": "twoGbMaxExtentSparse"}
    return api.convert(str(directory / "disk.raw"), str(directory / "disk.vmdk"), options=options)


def chain(directory: Path, *, force: bool = False) -> object:
    source, target = str(directory / "top.qcow2"), str(directory / "top.vmdk")
    return api.convert(source, target, chain=True, force=force)


def chain_again(directory: Path) -> object:
    return chain(directory, force=True)


WORKS = {
    "fanout": Work(fan_out, ("disk.qcow2", "disk.vmdk", "disk.vdi"), "disk.qcow2"),
    "split": Work(split, ("disk-s001.vmdk", "disk.vmdk"), "disk.vmdk"),
    "chain": Work(chain, ("disk.vmdk", "top.vmdk"), "top.vmdk"),
    "chain by force": Work(chain_again, ("disk.vmdk", "top.vmdk"), "top.vmdk"),
}


@pytest.fixture(params=WORKS)
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Work:
    """A directory `work` with what is converted, and how."""
    (tmp_path / "work").mkdir()
    make_disk(tmp_path / "work" / "disk.raw", MIB, pieces=2)
    (tmp_path / "work" / "top.qcow2").write_bytes(qcow2_images.empty_overlay("disk.raw", cluster_bits=16))
    found = WORKS[request.param]
    if found.run is chain_again:
        for name in found.targets:
            (tmp_path / "work" / name).write_bytes(OLD)
    return found


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def is_new(path: Path) -> bool:
    return path.exists() and path.stat().st_size > len(OLD)


def copies(directory: Path, work: Work) -> Iterator[tuple[int, Path]]:
    """Yields each call to stop at, and a directory of its own to do it in."""
    # The first run of a user makes a key.
    work.run(shutil.copytree(directory / "work", directory / "first"))
    folder = shutil.copytree(directory / "work", directory / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stopper = Stopper(patch, -1)
        work.run(folder)
        assert all(is_new(folder / name) for name in work.targets)
    for at in range(stopper.made):
        yield at, shutil.copytree(directory / "work", directory / f"stopped-{at}")


def stopped(work: Work, folder: Path, at: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        Stopper(patch, at)
        work.run(folder)


@pytest.mark.parametrize("unnamed", [True, False], ids=["nameless", "named"])
def test_the_run_after_a_kill_leaves_all_files_or_no_file(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        refuse(monkeypatch, Directory, "create_unnamed", errno.EOPNOTSUPP)
    before = names(tmp_path / "work")
    outcomes = set()
    for at, folder in copies(tmp_path, work):
        stopped(work, folder, at)
        # A base that is new below a top that is old would be a disk that nobody has ever had.
        assert [is_new(folder / name) for name in work.targets] != [True, False] or not (folder / work.named).exists()
        # The next run: it is refused where the set is complete and nothing is to be replaced.
        with suppress(VmconvError):
            work.run(folder)
        outcomes.add(tuple(is_new(folder / name) for name in work.targets))
        assert names(folder) == before | set(work.targets), at
        TRIED["kills while files got their names"] += 1
        shutil.rmtree(folder)
    assert outcomes == {(True,) * len(work.targets)}


def test_recovery_after_a_kill_leaves_all_files_or_no_file(work: Work, tmp_path: Path) -> None:
    outcomes = set()
    for at, folder in copies(tmp_path, work):
        stopped(work, folder, at)
        with suppress(AccessError):
            api.recover(str(folder / work.targets[-1]))
        found = {is_new(folder / name) for name in work.targets}
        assert len(found) == 1, at
        outcomes |= found
        TRIED["kills while files got their names"] += 1
        shutil.rmtree(folder)
    assert outcomes == {True, False}


def test_an_interrupted_recovery_is_repeated(work: Work, tmp_path: Path) -> None:
    for at, folder in copies(tmp_path, work):
        stopped(work, folder, at)
        for again in range(4):
            with pytest.MonkeyPatch.context() as patch, suppress(Stopped, AccessError):
                Stopper(patch, again)
                api.recover(str(folder / work.targets[-1]))
        with suppress(AccessError):
            api.recover(str(folder / work.targets[-1]))
        assert len({is_new(folder / name) for name in work.targets}) == 1, at
        shutil.rmtree(folder)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_error_at_any_call_leaves_all_files_or_no_file_or_lists_them(
    work: Work, tmp_path: Path, number: int
) -> None:
    before = names(tmp_path / "work")
    for at, folder in copies(tmp_path, work):
        error = OSError(number, os.strerror(number))
        with pytest.MonkeyPatch.context() as patch:
            Stopper(patch, at, error)
            with suppress(VmconvError):
                work.run(folder)
        if any(name.endswith(".names") for name in names(folder)):
            api.recover(str(folder / work.targets[-1]))
        found = {is_new(folder / name) for name in work.targets}
        assert len(found) == 1, (at, names(folder))
        if found == {False}:
            assert names(folder) <= before | set(work.targets), at
        TRIED["errors while files got their names"] += 1
        shutil.rmtree(folder)


def refuse(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    def refused(*_arguments: Any, **_more: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, refused)


def test_a_name_created_meanwhile_leaves_no_file_of_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    rename = Directory.rename

    def interfering(self: Directory, old: str, new: str, *, replace: bool) -> None:
        if new == "disk.vdi":
            (tmp_path / new).write_bytes(OLD)
        rename(self, old, new, replace=replace)

    monkeypatch.setattr(Directory, "rename", interfering)
    with pytest.raises(BackendError, match=r"disk\.vdi: already exists"):
        fan_out(tmp_path)
    assert names(tmp_path) == {"disk.raw", "disk.vdi"}
    assert (tmp_path / "disk.vdi").read_bytes() == OLD


def kill_in_names(work: Work, folder: Path) -> None:
    """Leaves a set that is committed and of which not all have their names."""
    with pytest.MonkeyPatch.context() as patch:
        real = Directory.rename

        def dying(self: Directory, old: str, new: str, *, replace: bool) -> None:
            if new == work.targets[1]:
                for name in CALLS:
                    refuse_all(patch, name)
                raise Stopped
            real(self, old, new, replace=replace)

        patch.setattr(Directory, "rename", dying)
        with pytest.raises(Stopped):
            work.run(folder)


def refuse_all(patch: pytest.MonkeyPatch, name: str) -> None:
    def refused(*_arguments: Any, **_more: Any) -> Any:
        raise Stopped

    patch.setattr(Directory, name, refused)


def journal(directory: Path) -> Path:
    (found,) = directory.glob(".vmconv-*.names")
    return found


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A directory with a set of which one file has its name."""
    make_disk(tmp_path / "disk.raw", MIB)
    kill_in_names(WORKS["fanout"], tmp_path)
    assert names(tmp_path) > {"disk.raw", "disk.qcow2"}
    assert not (tmp_path / "disk.vmdk").exists()
    return tmp_path


def test_a_command_that_misses_a_file_of_the_set_finishes_it(half: Path) -> None:
    assert api.compare(str(half / "disk.vdi"), str(half / "disk.raw"))
    assert names(half) == {"disk.raw", *WORKS["fanout"].targets}


def test_recover_finishes_the_set_from_the_command_line(half: Path) -> None:
    command = [sys.executable, "-m", "vmconv", "recover", str(half / "disk.qcow2")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, "the change is complete" in done.stdout) == (0, True)
    assert names(half) == {"disk.raw", *WORKS["fanout"].targets}


@pytest.mark.parametrize("change", ["owner", "mode", "mark", "content", "fifo", "link"])
def test_a_journal_that_the_user_has_not_made_is_not_followed(half: Path, change: str, tmp_path: Path) -> None:
    path = journal(half)
    if change == "owner":
        os.chown(path, 1000, 1000)
    elif change == "mode":
        path.chmod(0o666)
    elif change == "mark":
        data = path.read_bytes()
        path.write_bytes(data[:96] + bytes(32) + data[128:])
    elif change == "content":
        path.write_bytes(path.read_bytes().replace(b"disk.vdi", b"disk.vdX"))
    elif change == "fifo":
        path.unlink()
        os.mkfifo(path)
    else:
        path.rename(half / "journal")
        path.symlink_to(half / "journal")
    before = names(half)
    with pytest.raises(VmconvError):
        api.info(str(half / "disk.vdi"))
    assert names(half) == before


@pytest.mark.parametrize("fields", [bytes(16 << 20), b".vmconv-0000000000000000.tmp\0" + b"1\0disk.vdi\0" * (1 << 20)])
def test_a_journal_of_very_many_files_costs_little(half: Path, fields: bytes) -> None:
    import resource

    from vmconv.backends import naming

    path = journal(half)
    body = b"new\0" + fields
    digest = naming._digest(body)
    path.write_bytes(path.read_bytes()[:64] + digest + bytes(32) + body)
    done = subprocess.run(
        [sys.executable, "-m", "vmconv", "info", str(half / "disk.raw")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20)),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0
    with pytest.raises(VmconvError):
        api.recover(str(half / "disk.vdi"), trust=True)


@pytest.mark.parametrize("name", ["../disk.vdi", "/etc/disk", "", "..", "a/b"])
def test_a_journal_names_plain_names_only(half: Path, name: str) -> None:
    from vmconv.backends import naming

    body = naming.Set((naming.Named(temporary_name("x"), 1, name),), False).encoded()
    assert naming._parse(body) is None


def test_a_set_that_is_being_named_is_left_to_its_run(half: Path) -> None:
    import fcntl

    with journal(half).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = names(half)
        with pytest.raises(AccessError, match="another process is writing it"):
            api.fanout(str(half / "disk.raw"), ["qcow2", "vmdk", "vdi"], directory=str(half))
        assert names(half) == before


def test_the_files_of_a_set_that_is_not_finished_are_no_leftovers(half: Path) -> None:
    # Another target whose temporary files have the same checksum in their names.
    with Directory.at(str(half)) as directory:
        from vmconv.backends import naming

        waiting = [name for name in names(half) if name.endswith(".tmp")]
        assert naming.needed(directory) >= set(waiting)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_at_any_rename_leaves_all_files_or_no_file(tmp_path: Path, number: int) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    make_disk(tmp_path / "disk.raw", MIB)
    command = [sys.executable, "-m", "vmconv", "fanout", "-q", str(tmp_path / "disk.raw"), "--to", "qcow2,vmdk,vdi"]
    for call in ("renameat2", "linkat", "unlinkat") if number == signal.SIGKILL else ("renameat2",):
        for when in range(1, 4):
            inject = f"inject={call}:signal={signal.Signals(number).name}:when={when}"
            traced = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject, *command]
            done = subprocess.run(traced, cwd=tmp_path, capture_output=True, check=False, timeout=600)
            if number == signal.SIGKILL:
                subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=600)
            there = names(tmp_path) - {"disk.raw"}
            assert there in (set(), set(WORKS["fanout"].targets)), (call, when)
            assert number == signal.SIGKILL or (done.returncode == 0) == bool(there), done.stderr
            for name in there:
                (tmp_path / name).unlink()


# One file


def test_a_directory_that_keeps_its_names_gets_a_single_new_image(tmp_path: Path) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    box = tmp_path / "box"
    box.mkdir()
    if subprocess.run(["chattr", "+a", box], capture_output=True, check=False).returncode:
        pytest.skip("this filesystem has no append-only directories")
    try:
        api.convert(str(tmp_path / "disk.raw"), str(box / "disk.qcow2"))
        assert names(box) == {"disk.qcow2"}
        with pytest.raises(VmconvError, match="append-only"):
            api.fanout(str(tmp_path / "disk.raw"), ["vmdk", "vdi"], directory=str(box))
        assert names(box) == {"disk.qcow2"}
    finally:
        subprocess.run(["chattr", "-a", box], check=True)


def test_a_filesystem_without_renames_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, Directory, "create_unnamed", errno.EOPNOTSUPP)
    refuse(monkeypatch, Directory, "rename", errno.EPERM)
    make_disk(tmp_path / "disk.raw", MIB)
    written: list[object] = []
    monkeypatch.setattr(os, "pwritev", lambda *_: written.append(1))
    with pytest.raises(BackendError, match="cannot be created"):
        api.convert(str(tmp_path / "disk.raw"), str(tmp_path / "disk.qcow2"))
    assert not written
    assert names(tmp_path) == {"disk.raw"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("links", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_gets_a_new_name_on_filesystems_that_cannot_refuse_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, links: int | None
) -> None:
    real = Directory.rename

    def rename(self: Directory, old: str, new: str, *, replace: bool) -> None:
        if not replace:
            raise OSError(number, os.strerror(number))
        real(self, old, new, replace=True)

    monkeypatch.setattr(Directory, "rename", rename)
    if links:
        refuse(monkeypatch, Directory, "link", links)
    refuse(monkeypatch, Directory, "create_unnamed", errno.EOPNOTSUPP)
    with Directory.at(str(tmp_path)) as directory:
        for _ in range(2):
            file = Temporary(directory, "target")
            if (tmp_path / "target").exists():
                with pytest.raises(FileExistsError):
                    file.appear(replace=False)
                file.remove()
            else:
                file.appear(replace=False)
            file.close()
    assert names(tmp_path) == {"target"}


def test_an_unfinished_journal_with_a_temporary_name_is_removed_for_the_last_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, Directory, "create_unnamed", errno.EOPNOTSUPP)
    with Directory.at(str(tmp_path)) as directory:
        files = [Temporary(directory, name) for name in ("first", "last")]
        images = names(tmp_path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            Stopper(patch, 2)  # the journal is created and renamed, not yet written
            naming.commit(directory, files, replace=False, durable=True)
        (journal,) = names(tmp_path) - images
        assert remove_stale(directory, ["last"], but=images) == [journal]
        for file in files:
            file.close()


@pytest.mark.parametrize("extra", [0, 20])
def test_names_of_any_length_are_made(tmp_path: Path, extra: int) -> None:
    make_disk(tmp_path / "disk.raw", MIB)
    target = tmp_path / ("é" * ((255 - extra - 6) // 2) + ".qcow2")
    api.convert(str(tmp_path / "disk.raw"), str(target))
    api.convert(str(tmp_path / "disk.raw"), str(target), force=True)
    assert api.compare(str(target), str(tmp_path / "disk.raw"))


def test_temporary_names_are_short_and_of_one_form() -> None:
    assert re.fullmatch(r"\.vmconv-[0-9a-f]{16}\.tmp", temporary_name("x" * 255))
