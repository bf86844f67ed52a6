"""What a program cannot choose: which standard streams it has, whether they can be written to, signals, the umask."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.disks import MIB, make_disk
from vmconv import api

CLI = [sys.executable, "-m", "vmconv"]
STREAMS = ("stdin", "stdout", "stderr")


def closing(*numbers: int) -> Callable[[], None]:
    """Returns what closes descriptors in a child before it becomes the program."""

    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


def run(*arguments: str | Path, closed: tuple[int, ...] = (), **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the program without some of its standard descriptors."""
    streams: dict[str, Any] = dict.fromkeys(STREAMS[1:], subprocess.PIPE) | more
    command = [*CLI, *map(str, arguments)]
    return subprocess.run(command, preexec_fn=closing(*closed), check=False, timeout=600, text=False, **streams)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", 4 * MIB)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_a_disk_is_converted_without_standard_streams(disk: Path, closed: tuple[int, ...]) -> None:
    done = run("convert", "--backend", "copy", disk, disk.with_name("target.qcow2"), closed=closed)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    # A message that went to a descriptor of the image would have damaged it.
    assert api.compare(str(disk), str(disk.with_name("target.qcow2")))


@pytest.mark.parametrize(
    "command", [["info"], ["map"], ["compare"], ["plan"], ["check"], ["mount"], ["serve"]], ids=str
)
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_no_command_fails_with_a_traceback_without_standard_streams(
    disk: Path, command: list[str], closed: tuple[int, ...]
) -> None:
    others = {"compare": [disk], "plan": [disk.with_name("target.qcow2")]}.get(command[0], [])
    arguments = ["--help"] if command[0] in ("mount", "serve") else [disk, *others]
    done = run(*command, *arguments, closed=closed)
    assert done.returncode in (0, 63)
    assert b"Traceback" not in done.stderr


def test_an_image_is_not_streamed_to_a_standard_output_that_is_closed(disk: Path) -> None:
    done = run("convert", "-O", "qcow2", disk, "-", closed=(1,))
    assert done.returncode == 2
    assert b"standard output is closed" in done.stderr


@pytest.mark.parametrize("number", [1, 2])
def test_a_result_that_cannot_be_printed_is_made_all_the_same(disk: Path, number: int) -> None:
    target = disk.with_name("target.qcow2")
    with Path("/dev/full").open("wb") as full:
        streams: dict[str, Any] = {STREAMS[number]: full}
        done = run("convert", "--backend", "copy", "-p", disk, target, **streams)
    assert done.returncode == 0
    assert api.compare(str(disk), str(target))
    if number == 1:
        assert done.stderr.splitlines()[-1] == b"vmconv: standard output: No space left on device"


def test_a_closed_pipe_is_no_failure_once_the_target_is_made(disk: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("convert", disk, disk.with_name("target.qcow2"), stdout=writing)
    os.close(writing)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert api.compare(str(disk), str(disk.with_name("target.qcow2")))


def test_a_failed_write_names_standard_output(disk: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run("info", disk, stdout=full)
    assert (done.returncode, done.stderr) == (1, b"vmconv: standard output: No space left on device\n")


def test_an_error_event_that_cannot_be_printed_is_no_traceback(disk: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run("convert", "--output", "json", "gone.raw", "target.qcow2", stdout=full)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"gone.raw: cannot be opened" in done.stderr


def test_names_of_any_bytes_are_printed_in_any_locale(disk: Path) -> None:
    name = os.fsencode(disk.parent) + b"/t\xff\xc3\xa9.qcow2"
    command = [*map(os.fsencode, CLI), b"convert", b"--output", b"json", os.fsencode(disk), name]
    for locale in ("C", "POSIX", "C.UTF-8", "en_US.ISO-8859-1"):
        environment = {**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["event"] == "result"
        os.unlink(name)


# Signals

STOPPED = """
import os, signal, sys, vmconv.conversion.pipeline as conversion
from vmconv.cli.main import main

place, number, *arguments = sys.argv[1:]
real = getattr(conversion, place)

def raising(*given, **more):
    os.kill(os.getpid(), int(number))
    return real(*given, **more)

setattr(conversion, place, raising)
raise SystemExit(main(arguments))
"""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(place: str, number: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a conversion that gets a signal at the beginning of a function of its."""
    command = [sys.executable, "-c", STOPPED, place, str(int(number)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize("number", ENDING)
def test_a_stopped_run_reports_that_nothing_was_created(disk: Path, number: int) -> None:
    done = stop("verify_result", number, "convert", disk, disk.with_name("target.qcow2"))
    assert done.returncode == 128 + number
    assert done.stderr.endswith("nothing was created\n")
    assert [path.name for path in disk.parent.iterdir()] == ["disk.raw"]


@pytest.mark.parametrize("number", ENDING)
def test_a_run_stopped_after_the_commit_reports_its_targets(disk: Path, number: int) -> None:
    target = disk.with_name("target.qcow2")
    done = stop("_result", number, "convert", disk, target)
    assert done.returncode == 0
    assert f"complete: {target}" in done.stderr
    assert str(target) in done.stdout
    assert api.compare(str(disk), str(target))


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(disk: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = stop("verify_result", signal.SIGHUP, "convert", disk, disk.with_name("target.qcow2"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.returncode == 0
    assert disk.with_name("target.qcow2").exists()


def test_a_signal_that_comes_with_the_names_is_raised_afterwards_with_the_results(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmconv.conversion import pipeline as conversion

    real = conversion._result

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(conversion, "_result", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        api.convert(str(disk), str(disk.with_name("target.qcow2")))
    (result,) = caught.value.results  # type: ignore[attr-defined]
    assert result.target == str(disk.with_name("target.qcow2"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_size_limit_leaves_nothing(disk: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    command = [*CLI, "convert", str(disk), str(disk.with_name("target.qcow2"))]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert [path.name for path in disk.parent.iterdir()] == ["disk.raw"]


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
def test_another_system_is_refused_in_one_line(system: str) -> None:
    """Before anything is imported that only Linux has."""
    code = f"import sys; sys.platform = {system!r}; sys.modules['fcntl'] = None; import vmconv.__main__ as m; m.run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"vmconv: needs Linux: conversions, copies and views do not work on {system}; ")


def test_another_system_is_refused_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    import vmconv

    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ImportError, match="needs Linux"):
        _ = vmconv.convert
    assert issubclass(vmconv.UsageError, vmconv.VmconvError)
