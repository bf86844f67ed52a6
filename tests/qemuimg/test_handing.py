"""`vmconv-qemu-img` as a program, installed as qemu-img: who answers, and that it never calls itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.requirements import oracle_program

PROGRAM = Path(sys.executable).with_name("vmconv-qemu-img")
FAKE = '#!/bin/sh\necho "real: $0 $*"\nexit 7\n'


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A program that stands for the real qemu-img."""
    return script(tmp_path / "real/qemu-img", FAKE)


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """The front end under the name of qemu-img."""
    (tmp_path / "front").mkdir()
    path = tmp_path / "front/qemu-img"
    path.symlink_to(PROGRAM)
    return path


def run(
    program: Path, *arguments: str, path: list[Path], cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": os.pathsep.join(map(str, path)), **variables}
    return subprocess.run(
        [program, *arguments], env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_real_one_is_found_behind_a_link_to_the_front_end(link: Path, real: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run(link, "amend", "a b", path=[link.parent, real.parent], VMCONV_QEMU_IMG_LOG=str(log))
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"real: {real} amend a b\n"
    assert log.read_text() == f"{real}: amend 'a b': amend: not a command of vmconv's front end\n"


def test_the_log_has_no_passphrases(link: Path, real: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = [
        *("convert", "--object", "secret,id=s,data=pass,,word,format=raw", "--image-opts"),
        *("driver=https,url=https://me:word@host/x,password=word", 'json:{"password": "word"}', "new"),
    ]
    assert run(link, *arguments, path=[link.parent, real.parent], VMCONV_QEMU_IMG_LOG=str(log)).returncode == 7
    text = log.read_text()
    assert "word" not in text.replace("password", "")
    assert "secret,id=s,data=...,format=raw" in text and "https://me:...@host/x" in text


def test_two_front_ends_do_not_call_each_other(link: Path, real: Path, tmp_path: Path) -> None:
    # A copy of the script has another path, as one of another environment has.
    other = tmp_path / "other/qemu-img"
    other.parent.mkdir()
    shutil.copy(PROGRAM, other)
    both = [link.parent, other.parent]
    assert run(link, "amend", path=[*both, real.parent]).returncode == 7
    assert run(other, "amend", path=[*both, real.parent]).returncode == 7
    done = run(link, "amend", path=both)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "qemu-img: amend: not a command of vmconv's front end (there is no other qemu-img to ask)\n"


def test_without_the_real_one_it_answers_what_it_can(link: Path, tmp_path: Path) -> None:
    def front(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run(link, *arguments, path=[link.parent], cwd=tmp_path)

    assert front("create", "-f", "qcow2", "a", "1M").returncode == 0
    checked = front("check", "a")
    assert (checked.returncode, checked.stdout.splitlines()[0]) == (0, "No errors were found on the image.")
    assert front("measure", "-O", "raw", "a").stdout == "required size: 1048576\nfully allocated size: 1048576\n"
    lost = front("compare", "a", "missing")
    assert (lost.returncode, lost.stderr.startswith("qemu-img: missing: ")) == (2, True)
    assert len(lost.stderr.splitlines()) == 1


def test_a_named_program_is_the_real_one(link: Path, real: Path, tmp_path: Path) -> None:
    path = script(tmp_path / "named/anything", FAKE)
    done = run(link, "dd", path=[real.parent], VMCONV_QEMU_IMG_REAL=str(path))
    assert done.stdout == f"real: {path} dd\n"


def test_verbs_can_be_left_to_the_real_one(link: Path, real: Path) -> None:
    done = run(link, "create", "x", path=[real.parent], VMCONV_QEMU_IMG_HAND_OVER="info,create")
    assert done.stdout == f"real: {real} create x\n"


def test_a_failure_of_storage_is_not_repeated(link: Path, real: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    target = tmp_path / "missing/new"
    done = run(link, "create", "-f", "qcow2", str(target), "1M", path=[real.parent], VMCONV_QEMU_IMG_LOG=str(log))
    assert done.returncode in (1, 7)
    assert not target.exists()


def test_handing_over_imports_no_arrays() -> None:
    code = (
        "import sys; sys.argv = ['qemu-img', 'amend']; from vmconv.cli.qemu_img import front\n"
        "front.hand_over = lambda *_: sorted({'numpy', 'argparse', 'pydantic', 'vmconv.api'} & set(sys.modules))\n"
        "print(front.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_real_program_answers_as_if_it_had_been_called(link: Path) -> None:
    program = Path(oracle_program("qemu-img"))
    handed = run(link, "info", "missing", path=[program.parent])
    direct = run(program, "info", "missing", path=[program.parent])
    assert (handed.returncode, handed.stdout, handed.stderr) == (direct.returncode, direct.stdout, direct.stderr)
