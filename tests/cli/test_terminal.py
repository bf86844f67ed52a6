"""What a terminal shows: colours, progress with rate and time left, and the chain as a tree."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk
from vmconv.cli.main import main
from vmconv.cli.output import ProgressBar

ESCAPE = re.compile("\x1b\\[[0-9;]*m")


def in_terminal(*arguments: str | Path, **changes: str) -> str:
    """Returns what a run prints on a terminal; variables of the environment are `changes`."""
    ours, theirs = pty.openpty()
    environment = surroundings({"TERM": "xterm", **changes})
    command = [sys.executable, "-m", "vmconv", *map(str, arguments)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        # Reading a terminal that no process has open is an error (EIO).
        while True:
            try:
                more = os.read(ours, 1 << 16)
            except OSError:
                break
            if not more:
                break
            said += more
        process.wait(timeout=600)
    os.close(ours)
    return said.decode()


def surroundings(changes: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {**kept, "LC_ALL": "C.UTF-8", **changes}


def in_pipe(*arguments: str | Path, **changes: str) -> str:
    command = [sys.executable, "-m", "vmconv", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, check=False, timeout=600, env=surroundings({"TERM": "xterm", **changes})
    )
    return (done.stdout + done.stderr).decode()


@pytest.fixture
def broken(tmp_path: Path, qemu_img: QemuImg) -> Path:
    """A chain of three whose base is gone."""
    qemu_img("create", "-f", "raw", tmp_path / "base.raw", "4M")
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "mid.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    (tmp_path / "base.raw").unlink()
    return tmp_path / "top.qcow2"


def tree_of(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[lines.index("chain:") + 1 :]


def test_info_shows_the_chain_as_a_tree(tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(tmp_path / "base.raw", 4 * MIB)
    qemu_img("create", "-f", "qcow2", "-b", raw.name, "-F", "raw", tmp_path / "mid.qcow2")
    options = ["-b", "mid.qcow2", "-F", "qcow2", "-o", f"data_file={tmp_path}/top.data"]
    qemu_img("create", "-f", "qcow2", *options, tmp_path / "top.qcow2")
    assert main(["info", str(tmp_path / "top.qcow2")]) == 0
    tree = tree_of(capsys.readouterr().out)
    assert [re.sub(r", [^,]* on disk\)", ")", line) for line in tree] == [
        f"    {tmp_path}/top.qcow2 (qcow2, 4 MiB)",
        f"    ├── {tmp_path}/top.data (data file)",
        f"    └── {tmp_path}/mid.qcow2 (qcow2, 4 MiB)",
        f"        └── {tmp_path}/base.raw (raw, 4 MiB)",
    ]
    assert main(["info", str(raw)]) == 0
    said = capsys.readouterr().out
    assert "chain:" not in said
    assert "has a child: mid.qcow2 refers to it; a change of this image would damage that one\n" in said
    assert main(["info", "--output", "json", str(raw)]) == 0
    assert json.loads(capsys.readouterr().out)["child"] == "mid.qcow2"


def test_a_missing_parent_is_shown_in_its_place(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(broken)]) == 0
    top, mid, base, hint = tree_of(capsys.readouterr().out)
    assert top.startswith(f"    {broken} (qcow2, 4 MiB")
    assert mid.startswith(f"    └── {broken.parent}/mid.qcow2 (qcow2, 4 MiB")
    assert base.startswith("        └── base.raw: not readable: ")
    assert "No such file or directory" in base
    assert "--parent FILE" in hint


def test_a_refused_parent_is_shown_in_its_place(
    tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    qemu_img("create", "-f", "raw", tmp_path / "secret.raw", "4M")
    qemu_img("create", "-f", "qcow2", "-b", "../secret.raw", "-F", "raw", inner / "top.qcow2")
    assert main(["info", str(inner / "top.qcow2")]) == 0
    _, base, hint = tree_of(capsys.readouterr().out)
    assert base.startswith("    └── ../secret.raw: not readable: top.qcow2: backing file '../secret.raw' lies outside")
    assert hint == f"        hint: if you trust the image, --allow-external {tmp_path}"


def test_a_terminal_without_unicode_gets_a_tree_too(broken: Path) -> None:
    said = in_terminal("info", broken, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    assert "`-- " in said
    assert "Traceback" not in said


def test_colours_are_for_terminals(broken: Path) -> None:
    shown = in_terminal("info", broken)
    assert "\x1b[1;31mbase.raw: not readable\x1b[0m" in shown
    for plain in (
        in_pipe("info", broken),
        in_terminal("info", broken, NO_COLOR="1"),
        in_terminal("info", broken, TERM="dumb"),
    ):
        assert "\x1b" not in plain
        assert plain.replace("\r", "") == ESCAPE.sub("", shown).replace("\r", "")
    # An empty NO_COLOR is as none; the word of its specification.
    assert in_terminal("info", broken, NO_COLOR="") == shown
    assert in_pipe("info", broken, FORCE_COLOR="1") == shown.replace("\r", "")
    assert "\x1b" not in in_terminal("info", "--output", "json", broken)


def test_errors_and_hints_have_colours() -> None:
    said = in_terminal("convert", "disk.raw", "disk.none")
    assert said.startswith("\x1b[1;31mvmconv:\x1b[0m ")
    assert "\r\n  \x1b[36mhint:\x1b[0m " in said
    assert ESCAPE.sub("", said).replace("\r", "") == in_pipe("convert", "disk.raw", "disk.none")


# Progress


class Terminal:
    """Standard error of a terminal, and a clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("vmconv.cli.output.time.monotonic", lambda: self.now)


def test_rate_and_time_left_follow_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(monkeypatch)
    bar = ProgressBar()
    bar(0, 1000 * MIB)
    for second in range(1, 11):
        terminal.now += 1
        bar(second * 10 * MIB, 1000 * MIB)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.rstrip() == "[###                           ]  10.00% of 0.977 GiB, 10 MiB/s, 1 min 30 s left"
    # Ten times faster: after the window the old speed does not count any more.
    for second in range(1, 7):
        terminal.now += 1
        bar((100 + second * 100) * MIB, 1000 * MIB)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.rstrip() == "[#####################         ]  70.00% of 0.977 GiB, 100 MiB/s, 3 s left"


def test_each_piece_of_work_has_a_rate_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(monkeypatch)
    bar = ProgressBar()
    bar(0, 100 * MIB, "sharing")
    terminal.now += 2
    bar(100 * MIB, 100 * MIB, "sharing")
    bar(0, 10 * MIB)
    terminal.now += 2
    bar(2 * MIB, 10 * MIB)
    bar.close()
    lines = [line.rstrip(" ") for line in capsys.readouterr().err.split("\r")]
    assert lines == [
        "",
        "sharing [                              ]   0.00% of 100 MiB",
        "sharing [##############################] 100.00% of 100 MiB, 50 MiB/s",
        "[                              ]   0.00% of 10 MiB",
        "[######                        ]  20.00% of 10 MiB, 1 MiB/s, 8 s left\n",
    ]


def test_a_terminal_shows_rate_and_time_left(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", 12 * MIB, pieces=1)
    raw.write_bytes(os.urandom(12 * MIB))
    said = in_terminal("convert", "--backend", "copy", "-r", "4M", raw, tmp_path / "disk.qcow2")
    assert re.search(r"\r\[#+ *\] +[0-9.]+% of 12[.0-9]* MiB, [0-9.]+ [KM]iB/s, [0-9]+ s left", said), said
    assert "disk.qcow2: shared 0 B, copied 12 MiB" in said
    # Each line fits.
    assert all(len(part) < 80 for part in said.replace("\n", "\r").split("\r") if part.startswith("["))


def test_sharing_is_progress_too(xfs_dir: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 12 * MIB, pieces=3)
    said = in_terminal("convert", raw, xfs_dir / "disk.qcow2")
    assert re.search(r"\rsharing \[#{30}\] 100.00% of [0-9.]+ [KM]iB *\r", said), said


def test_progress_is_shown_without_a_terminal_only_if_asked_for(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", 4 * MIB)
    assert "%" not in in_pipe("convert", raw, tmp_path / "one.qcow2")
    assert "100.00% of" in in_pipe("convert", "-p", raw, tmp_path / "two.qcow2")
    assert "%" not in in_terminal("convert", "-q", raw, tmp_path / "three.qcow2")
    assert vmconv.compare(str(raw), str(tmp_path / "two.qcow2"))
