"""A conversion happens as a whole or not at all, whatever stops it; and the source never changes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support import qcow2_images
from vmconv import api
from vmconv.backends.files import FileOutput
from vmconv.backends.temporary import temporary_name
from vmconv.errors import AccessError, BackendError, PlanError, VerifyError, VmconvError, ZeroCopyError
from vmconv.io.registry import installed
from vmconv.model.extents import Extents
from vmconv.model.layout import Layout, OutFile

PAYLOAD = bytes(range(256)) * 256 * 16
OLD = b"what was here before"
TEMPORARY = re.compile(r"\.vmconv-[0-9a-f]{16}\.tmp")
LEFT = temporary_name("target.qcow2")
CLI = [sys.executable, "-c", "from vmconv.cli.main import main; raise SystemExit(main())"]


class State(NamedTuple):
    """What must not change about a file."""

    digest: str
    inode: int
    mtime: int


def state(path: Path) -> State:
    status = path.stat()
    return State(hashlib.sha256(path.read_bytes()).hexdigest(), status.st_ino, status.st_mtime_ns)


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def make_source(directory: Path) -> Path:
    source = directory / "source.raw"
    source.write_bytes(PAYLOAD)
    return source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A raw disk in a directory of its own."""
    (tmp_path / "work").mkdir()
    return make_source(tmp_path / "work")


@pytest.fixture
def target(source: Path) -> Path:
    return source.with_name("target.qcow2")


def holds_the_payload(target: Path) -> bool:
    """True when the image is complete: a guest sees what it saw in the source."""
    return bool(api.compare(str(target), str(target.with_name("source.raw"))))


# Killed

KILLED = """
import os, signal, sys
from importlib import import_module
from vmconv import api

place, when, source, target, unnamed = sys.argv[1:]
if unnamed == "no":
    import errno
    from vmconv.io.directory import Directory

    def refuse(self):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    Directory.create_unnamed = refuse

module, _, path = place.partition(":")
owner = import_module(module)
*outer, name = path.split(".")
for part in outer:
    owner = getattr(owner, part)
real = getattr(owner, name)

def dying(*arguments, **more):
    if when == "after":
        real(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, dying)
api.convert(source, target)
"""

BEFORE_COMMIT = {
    "before the temporary file is locked": ("fcntl:flock", "before"),
    "before sharing": ("vmconv.backends.reflink:ReflinkOutput.share", "before"),
    "after sharing": ("vmconv.backends.reflink:ReflinkOutput.share", "after"),
    "before writing": ("vmconv.backends.files:FileOutput.write", "before"),
    "after the first write": ("vmconv.backends.files:FileOutput.write", "after"),
    "before the file is durable": ("vmconv.backends.files:FileOutput.finish", "before"),
    "before verifying": ("vmconv.conversion.pipeline:verify_result", "before"),
    "before the file is named": ("vmconv.backends.temporary:Temporary.appear", "before"),
}
each_filesystem = pytest.mark.parametrize("unnamed", ["yes", "no"])
"""Whether the filesystem has files without names (O_TMPFILE)."""


def kill_at(place: str, when: str, source: Path, target: Path, unnamed: str = "yes") -> None:
    """Runs a conversion that kills itself at this place; fails when it never gets there."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, when, str(source), str(target), unnamed],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@each_filesystem
@pytest.mark.parametrize("moment", BEFORE_COMMIT)
def test_a_killed_run_leaves_no_target_and_the_source_as_it_was(xfs_dir: Path, moment: str, unnamed: str) -> None:
    source = make_source(xfs_dir)
    before = state(source)
    kill_at(*BEFORE_COMMIT[moment], source, xfs_dir / "target.qcow2", unnamed)
    left = names(xfs_dir) - {source.name}
    assert all(TEMPORARY.fullmatch(name) for name in left)
    assert len(left) == (unnamed == "no")
    assert state(source) == before


@pytest.mark.parametrize("moment", BEFORE_COMMIT)
def test_the_run_after_a_killed_one_cleans_up_and_succeeds(xfs_dir: Path, moment: str) -> None:
    source, target = make_source(xfs_dir), xfs_dir / "target.qcow2"
    kill_at(*BEFORE_COMMIT[moment], source, target, "no")
    api.convert(str(source), str(target))
    assert names(xfs_dir) == {source.name, target.name}
    assert holds_the_payload(target)


@each_filesystem
def test_a_run_killed_after_the_file_got_its_name_leaves_a_complete_target(xfs_dir: Path, unnamed: str) -> None:
    source, target = make_source(xfs_dir), xfs_dir / "target.qcow2"
    kill_at("vmconv.backends.temporary:Temporary.appear", "after", source, target, unnamed)
    assert holds_the_payload(target)
    assert names(xfs_dir) == {source.name, target.name}


def test_a_second_name_is_removed_by_the_next_run_that_is_refused_too(source: Path, target: Path) -> None:
    api.convert(str(source), str(target))
    source.with_name(LEFT).hardlink_to(target)
    with pytest.raises(PlanError, match="already exists"):
        api.convert(str(source), str(target))
    assert target.stat().st_nlink == 1


def test_a_run_killed_while_replacing_leaves_the_old_target(xfs_dir: Path) -> None:
    source, target = make_source(xfs_dir), xfs_dir / "target.qcow2"
    target.write_bytes(OLD)
    script = KILLED.replace("api.convert(source, target)", "api.convert(source, target, force=True)")
    command = [sys.executable, "-c", script, "os:rename", "before", str(source), str(target), "yes"]
    assert subprocess.run(command, check=False, timeout=600).returncode == -signal.SIGKILL
    assert target.read_bytes() == OLD


# Temporary files of others


def test_the_temporary_file_of_a_living_run_is_left_alone(source: Path, target: Path) -> None:
    living = source.with_name(LEFT)
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        api.convert(str(source), str(target))
        assert living.exists()


@pytest.mark.parametrize(
    "name",
    [
        f"{LEFT}.keep",
        f"{LEFT[:16]}xyz.tmp",
        LEFT[1:],
        LEFT.upper(),
        temporary_name("other.qcow2"),
    ],
    ids=["longer", "no digits", "not hidden", "upper case", "of another target"],
)
def test_a_file_that_only_resembles_a_temporary_one_is_left_alone(source: Path, target: Path, name: str) -> None:
    source.with_name(name).write_bytes(b"mine")
    api.convert(str(source), str(target))
    assert source.with_name(name).read_bytes() == b"mine"


def test_a_symlink_with_the_name_of_a_temporary_file_is_not_followed(
    source: Path, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    link = source.with_name(LEFT)
    link.symlink_to(tmp_path / "precious")
    api.convert(str(source), str(target))
    assert link.is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"mine"


def test_a_pipe_with_the_name_of_a_temporary_file_does_not_hang_the_run(source: Path, target: Path) -> None:
    os.mkfifo(source.with_name(LEFT))
    api.convert(str(source), str(target))
    assert target.exists()


# Failures in the middle


def fail_writing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(self: FileOutput, offset: int, data: bytes) -> None:
        raise error

    monkeypatch.setattr(FileOutput, "write", failing)


def write_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the raw writer return a sound layout of the wrong disk."""

    def wrong(*arguments: object, **more: object) -> Layout:
        return Layout((OutFile(Extents.filled(len(PAYLOAD))),))

    monkeypatch.setattr(installed().formats["raw"], "write", wrong)


def fails(source: Path, target: Path, error: type[VmconvError], **options: Any) -> VmconvError:
    """Runs a conversion that must fail and leave everything as it was."""
    before, listing = state(source), names(source.parent)
    with pytest.raises(error) as caught:
        api.convert(str(source), str(target), **options)
    assert names(source.parent) == listing
    assert state(source) == before
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_a_backend_that_fails_leaves_nothing(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writing(monkeypatch, BackendError("the storage is on fire"))
    assert str(fails(source, target, BackendError)) == "the storage is on fire"


def test_an_input_output_error_names_the_target_and_leaves_nothing(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writing(monkeypatch, OSError(errno.EIO, "Input/output error"))
    assert "target.qcow2" in str(fails(source, target, BackendError))


def test_an_unexpected_failure_leaves_no_file(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        api.convert(str(source), str(target))
    assert names(source.parent) == {source.name}


def test_a_progress_callback_that_raises_leaves_nothing(source: Path, target: Path) -> None:
    def enough(done: int, to_do: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.convert(str(source), str(target), progress=enough)
    assert names(source.parent) == {source.name}


def test_a_result_that_is_not_the_source_s_disk_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zeros(monkeypatch)
    # The first byte of the payload is zero and so the same in both.
    assert "guest address 0x1" in str(fails(source, source.with_name("target.raw"), VerifyError))


def test_a_file_made_under_the_target_s_name_meanwhile_is_not_replaced(source: Path, target: Path) -> None:
    def interfere(done: int, to_do: int) -> None:
        target.write_bytes(OLD)

    with pytest.raises(BackendError, match="already exists"):
        api.convert(str(source), str(target), progress=interfere)
    assert target.read_bytes() == OLD
    assert names(source.parent) == {source.name, target.name}


def fill(directory: Path) -> None:
    """Takes all space that is left on the filesystem of a directory, root's reserve too."""
    step = 1 << 30
    with (directory / "filler").open("wb") as file:
        size = 0
        while step >= 4096:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError as exc:
                assert exc.errno == errno.ENOSPC
                step //= 2


def test_a_disk_that_cannot_fit_is_refused_before_anything_is_written(ext4_dir: Path) -> None:
    source = make_source(ext4_dir)
    fill(ext4_dir)
    error = fails(source, ext4_dir / "target.qcow2", PlanError)
    assert re.search(r"\d+ bytes would have to be written, \d+ are free", str(error))


def test_a_filesystem_that_runs_full_in_the_middle_leaves_nothing(ext4_dir: Path) -> None:
    source, target = make_source(ext4_dir), ext4_dir / "target.qcow2"
    before = state(source)

    def take_all(done: int, to_do: int) -> None:
        if not (ext4_dir / "filler").exists():
            fill(ext4_dir)

    with pytest.raises(BackendError, match="No space left on device"):
        api.convert(str(source), str(target), progress=take_all)
    assert names(ext4_dir) == {source.name, "filler"}
    assert state(source) == before


# Targets that exist


def test_an_existing_target_is_not_replaced(source: Path, target: Path) -> None:
    target.write_bytes(OLD)
    assert "--force" in (fails(source, target, PlanError).hint or "")
    assert target.read_bytes() == OLD


def test_an_existing_target_is_replaced_by_force(source: Path, target: Path) -> None:
    target.write_bytes(OLD)
    api.convert(str(source), str(target), force=True)
    assert holds_the_payload(target)
    assert names(source.parent) == {source.name, target.name}


def test_open_descriptors_keep_reading_the_old_target(source: Path, target: Path) -> None:
    target.write_bytes(OLD)
    with target.open("rb") as reader:
        api.convert(str(source), str(target), force=True)
        assert reader.read() == OLD


def test_a_forced_run_that_fails_leaves_the_old_target(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write_bytes(OLD)
    fail_writing(monkeypatch, OSError(errno.EIO, "Input/output error"))
    fails(source, target, BackendError, force=True)
    assert target.read_bytes() == OLD


def test_a_forced_result_that_is_wrong_leaves_the_old_target(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.with_name("target.raw")
    target.write_bytes(OLD)
    write_zeros(monkeypatch)
    fails(source, target, VerifyError, force=True)
    assert target.read_bytes() == OLD


def make_target_directory(target: Path) -> None:
    target.mkdir()


def make_target_pipe(target: Path) -> None:
    os.mkfifo(target)


@pytest.mark.parametrize("make", [make_target_directory, make_target_pipe], ids=["directory", "pipe"])
def test_a_target_that_is_no_file_is_refused_even_by_force(
    source: Path, target: Path, make: Callable[[Path], None]
) -> None:
    make(target)
    fails(source, target, PlanError, force=True)


def test_a_target_in_a_directory_that_does_not_exist_is_refused(source: Path) -> None:
    fails(source, source.with_name("gone") / "target.qcow2", PlanError)


def test_a_symlink_as_target_still_leads_to_the_file(source: Path, target: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.qcow2"
    real.write_bytes(OLD)
    target.symlink_to(real)
    api.convert(str(source), str(target), force=True)
    assert target.is_symlink()
    assert target.readlink() == real
    assert holds_the_payload(target)


def test_the_target_of_a_symlink_is_not_replaced_without_force(source: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "real.qcow2").write_bytes(OLD)
    target.symlink_to(tmp_path / "real.qcow2")
    fails(source, target, PlanError)
    assert target.read_bytes() == OLD


def test_a_dangling_symlink_gets_the_file_that_it_names(source: Path, target: Path, tmp_path: Path) -> None:
    target.symlink_to(tmp_path / "real.qcow2")
    api.convert(str(source), str(target))
    assert not (tmp_path / "real.qcow2").is_symlink()
    assert holds_the_payload(target)


# Targets that are part of the source


@pytest.fixture
def chain(source: Path) -> Path:
    """An image on top of the source."""
    overlay = source.with_name("overlay.qcow2")
    overlay.write_bytes(qcow2_images.empty_overlay(source.name))
    return overlay


def itself(layer: Path) -> Path:
    return layer


def hard_link(layer: Path) -> Path:
    link = layer.with_name("hardlink")
    link.hardlink_to(layer)
    return link


def symlink(layer: Path) -> Path:
    link = layer.with_name("symlink")
    link.symlink_to(layer)
    return link


def other_spelling(layer: Path) -> Path:
    return layer.parent / ".." / layer.parent.name / layer.name


SPELLINGS = [itself, hard_link, symlink, other_spelling]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layer", ["overlay.qcow2", "source.raw"])
def test_a_layer_of_the_source_is_no_target_even_by_force(
    chain: Path, layer: str, spelling: Callable[[Path], Path]
) -> None:
    target = spelling(chain.with_name(layer))
    before = state(chain.with_name("source.raw"))
    error = fails(chain, target, PlanError, target_format="raw", force=True)
    assert "is part of the source" in str(error)
    assert state(chain.with_name("source.raw")) == before


def test_the_data_file_of_the_source_is_no_target_even_by_force(source: Path) -> None:
    image = source.with_name("disk.qcow2")
    image.write_bytes(qcow2_images.with_data_file(source.name))
    before = state(source)
    fails(image, source, PlanError, force=True)
    assert state(source) == before


# Sources that change


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"!")


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"!")


def touch(path: Path) -> None:
    path.touch()


def truncate(path: Path) -> None:
    os.truncate(path, len(PAYLOAD) // 2)


@pytest.mark.parametrize("change", [append, write_into, touch, truncate])
def test_a_source_that_changes_meanwhile_leaves_no_target(
    source: Path, target: Path, change: Callable[[Path], None]
) -> None:
    with pytest.raises(VmconvError, match=r"source\.raw"):
        api.convert(str(source), str(target), announce=lambda _: change(source))
    assert names(source.parent) == {source.name}


@pytest.mark.parametrize("change", [append, write_into, touch])
def test_a_source_that_changes_meanwhile_is_an_access_error_with_a_hint(
    source: Path, target: Path, change: Callable[[Path], None]
) -> None:
    with pytest.raises(AccessError, match="changed while it was being converted") as caught:
        api.convert(str(source), str(target), announce=lambda _: change(source))
    assert caught.value.hint


def test_a_backing_file_that_changes_meanwhile_leaves_no_target(chain: Path, target: Path) -> None:
    with pytest.raises(AccessError, match=r"source\.raw: changed"):
        api.convert(str(chain), str(target), announce=lambda _: touch(chain.with_name("source.raw")))
    assert not target.exists()


# Zero-copy only


def test_required_zero_copy_that_storage_cannot_do_touches_nothing(ext4_dir: Path) -> None:
    source = make_source(ext4_dir)
    before = ext4_dir.stat().st_mtime_ns
    error = fails(source, ext4_dir / "target.qcow2", ZeroCopyError, zero_copy="require")
    assert ext4_dir.stat().st_mtime_ns == before
    assert f"{len(PAYLOAD)} bytes would have to be copied" in str(error)


def test_required_zero_copy_that_storage_can_do_copies_nothing(reflink_dir: Path) -> None:
    source = make_source(reflink_dir)
    result = api.convert(str(source), str(reflink_dir / "target.qcow2"), zero_copy="require")
    assert (result.totals.shared, result.totals.copied) == (len(PAYLOAD), 0)


def test_a_plan_touches_nothing(ext4_dir: Path) -> None:
    source = make_source(ext4_dir)
    before = ext4_dir.stat().st_mtime_ns
    api.plan(str(source), str(ext4_dir / "target.qcow2"))
    assert names(ext4_dir) == {source.name}
    assert ext4_dir.stat().st_mtime_ns == before


# The command line


def run_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*CLI, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_required_zero_copy_has_an_exit_code_of_its_own(ext4_dir: Path) -> None:
    source = make_source(ext4_dir)
    done = run_cli("convert", "--zero-copy", "require", source, ext4_dir / "target.qcow2")
    assert done.returncode == 3
    assert names(ext4_dir) == {source.name}


def test_an_error_is_one_line_and_its_hint_another(source: Path, target: Path) -> None:
    target.write_bytes(OLD)
    done = run_cli("convert", source, target)
    assert done.returncode == 4
    error, hint = done.stderr.splitlines()
    assert error == f"vmconv: {target}: already exists"
    assert hint == "  hint: --force replaces it"
    assert not done.stdout


def test_an_error_without_a_hint_is_one_line(source: Path) -> None:
    done = run_cli("convert", source, source.with_name("gone") / "target.qcow2")
    (line,) = done.stderr.splitlines()
    assert line.startswith("vmconv: ")


def test_a_full_device_behind_standard_output_is_no_traceback(source: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*CLI, "info", str(source)], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


SLOW = """
import sys, time
from vmconv.backends.files import FileOutput
from vmconv.backends.temporary import temporary_name
from vmconv.io.directory import Directory
from vmconv.cli.main import main

def slow(*arguments):
    print("busy", flush=True)
    # Until the signal comes.
    for _ in range(6000):
        time.sleep(0.1)

setattr(FileOutput, sys.argv[1], slow)
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
@pytest.mark.parametrize("method", ["write", "copy"])
def test_a_signal_cleans_up_and_gives_its_exit_code(ext4_dir: Path, number: int, code: int, method: str) -> None:
    source, target = make_source(ext4_dir), ext4_dir / "target.qcow2"
    target.write_bytes(OLD)
    before = state(source)
    command = [sys.executable, "-c", SLOW, method, "convert", "--force", "--backend", "copy", str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "busy\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert names(ext4_dir) == {source.name, target.name}
    assert target.read_bytes() == OLD
    assert state(source) == before


def test_sigterm_while_plugins_are_imported_ends_the_run(source: Path, target: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "acme-1.dist-info").mkdir(parents=True)
    (site / "acme-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (site / "acme-1.dist-info" / "entry_points.txt").write_text("[vmconv]\nacme = acme_plugin\n")
    (site / "acme_plugin.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*CLI, "convert", str(source), str(target)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 143
    assert not target.exists()
