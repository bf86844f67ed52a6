"""Completion in real shells, on a terminal, as a user types."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.requirements import oracle_program
from vmconv.cli.candidates import candidates, split
from vmconv.io.registry import installed

SHELLS = {
    "bash": ("bash", "--norc", "--noprofile", "-i"),
    "zsh": ("zsh", "-f", "-i"),
    "fish": ("fish", "--no-config", "-i"),
}
START = {
    "bash": 'eval "$(vmconv completion bash)"',
    "zsh": 'autoload -U compinit && compinit -u -D && eval "$(vmconv completion zsh)"',
    "fish": "vmconv completion fish | source",
}
TYPED = {
    "command": ("form\t", ["formats"]),
    "verb": ("machine conv\t", ["machine", "convert"]),
    "format": ("convert -O qco\tdisk.raw new", ["convert", "-O", "qcow2", "disk.raw", "new"]),
    "name": ("convert -O qcow2 -o cluster_s\t64K", ["convert", "-O", "qcow2", "-o", "cluster_size=64K"]),
    "value": ("convert -O vmdk -o subformat=streamO\t", ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized"]),
    "second name": (
        "convert -O qcow2 -o compat=1.1,cluster_s\t1M",
        ["convert", "-O", "qcow2", "-o", "compat=1.1,cluster_size=1M"],
    ),
    "choice": ("info --output js\tdisk.raw", ["info", "--output", "json", "disk.raw"]),
    "option": ("convert --zero-c\trequire", ["convert", "--zero-copy", "require"]),
    "file": ("info di\t", ["info", "disk.raw"]),
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with a `vmconv` that answers completions, and else writes its arguments into a file."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "vmconv"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = completion ]; then exec {sys.executable} -m vmconv "$@"; fi
printf '%s\\n' "$@" > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/arguments
"""
    )
    script.chmod(0o755)
    return directory


def typed(shell: str, keys: str, programs: Path, directory: Path) -> list[str]:
    """Types a command line into a shell and returns the arguments that vmconv is called with."""
    arguments = programs.parent / "arguments"
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(programs), "TERM": "dumb", "LANG": "C.UTF-8"}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(directory)
        os.execvpe(SHELLS[shell][0], SHELLS[shell], environment)
    try:
        # A shell drops what is typed before it has set up the terminal: the first line creates a file.
        ready = programs.parent / "ready"
        _until(terminal, ready, f"{START[shell]}; touch {ready}\n")
        return _until(terminal, arguments, f"vmconv {keys}\n").read_text().splitlines()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)


def _until(terminal: int, wanted: Path, keys: str) -> Path:
    """Writes keys, and reads the terminal until a file exists."""
    os.write(terminal, keys.encode())
    shown = b""
    deadline = time.monotonic() + 120
    while not wanted.exists():
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        if select.select([terminal], [], [], 0.05)[0]:
            shown += os.read(terminal, 65536)
    return wanted


@pytest.mark.parametrize("what", TYPED)
@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell: str, what: str, programs: Path, tmp_path: Path) -> None:
    oracle_program(shell)
    directory = tmp_path / "work"
    directory.mkdir()
    (directory / "disk.raw").touch()
    keys, expected = TYPED[what]
    assert typed(shell, keys, programs, directory) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vmconv for", ["formats"]),
        ("sudo /usr/bin/vmconv for", ["formats"]),
        ("vmconv --de", ["--debug"]),
        ("vmconv --debug for", ["formats"]),
        ("vmconv machine conv", ["convert"]),
        ("vmconv convert --output=j", ["--output=json"]),
        ("vmconv convert a.raw b.vmdk -o subformat=streamO", ["subformat=streamOptimized"]),
        ("vmconv convert 'a b.raw' b.qcow2 -o lazy_refcounts=", ["lazy_refcounts=off", "lazy_refcounts=on"]),
        ("vmconv create -f qcow2 -o clus", ["cluster_size="]),
        ("vmconv fanout a --to raw,qc", ["raw,qcow2"]),
        ("vmconv fanout a --to raw,qcow2 -o qcow2.clus", ["qcow2.cluster_size="]),
        ("vmconv convert --backend re", ["reflink"]),
        ("vmconv convert -O ew", []),
        ("vmconv info -f ew", ["ewf"]),
        ("vmconv info 'disk", []),
        ("vmconv nonsense ", []),
        ("vmconv convert --mode ", []),
        ("other pro", []),
        ("vmconv", []),
        ("", []),
    ],
)
def test_candidates(line: str, expected: list[str]) -> None:
    assert candidates(split(line)) == expected


def test_a_broken_format_does_not_hide_the_options_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_self: object) -> None:
        raise SystemExit("broken")

    monkeypatch.setattr(type(installed().formats["vdi"]), "options", fails)
    assert candidates(split("vmconv convert -o cluster_")) == ["cluster_size="]


@pytest.mark.parametrize("line", ["vmconv convert -O vmdk -o a=1,subformat=streamO", "vmconv convert --output=js"])
def test_bash_gets_what_follows_its_word_breaks(line: str) -> None:
    command = [sys.executable, "-m", "vmconv", "completion", "bash", "--answer", line]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout in ("streamOptimized\n", "json\n")
