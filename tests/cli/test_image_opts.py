"""Sources in QEMU's notations: what is taken, and that nothing else is opened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.disks import QemuImg, qemu_io
from vmconv.cli.image_opts import named
from vmconv.errors import UsageError


@pytest.mark.parametrize(
    ("text", "image_opts", "found"),
    [
        ("driver=qcow2,file.filename=a,,b", True, ("a,b", "qcow2")),
        ("driver=vmdk,file.driver=file,file.filename=x=y", True, ("x=y", "vmdk")),
        ("driver=file,filename=/dev/x", True, ("/dev/x", "raw")),
        ("driver=host_device,filename=/dev/x", True, ("/dev/x", "raw")),
        ('json:{"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}', False, ("a", "qcow2")),
        ('json:{"driver": "raw", "file.filename": "a"}', False, ("a", "raw")),
        # The driver reads local files.
        ("driver=raw,file.filename=-", True, ("./-", "raw")),
        ("driver=file,filename=https://localhost/x", True, ("./https://localhost/x", "raw")),
        ("driver=qcow2", False, ("driver=qcow2", None)),
    ],
)
def test_a_path_and_a_format(text: str, image_opts: bool, found: tuple[str, str | None]) -> None:
    assert named(text, None, image_opts=image_opts) == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('json:{"driver": "nbd", "host": "x"}', "host=x: is not taken"),
        ('json:{"driver": "qcow2", "file": {"driver": "https", "url": "x"}}', "file.url=x: is not taken"),
        ('json:{"driver": "qcow2", "file": {"driver": "https", "filename": "x"}}', "file.driver=https: only file"),
        ('json:{"driver": "qcow2", "backing": {"driver": "raw"}, "file": {"filename": "x"}}', "backing.driver=raw"),
        ('json:{"driver": 3, "file": {"filename": "x"}}', "driver: is not text"),
        ('json:{"driver": "qcow2", "file": 3}', "file=3: is not taken"),
        ('json:{"driver": "raw", "offset": 512, "file": {"filename": "x"}}', "offset=512: is not taken"),
        ('json:{"driver": "qcow2", "file": {"filename": "x"}, "file.filename": "y"}', "file.filename: is given twice"),
        ('json:{"driver": "qcow2", "driver": "raw", "file": {"filename": "x"}}', "driver: is given twice"),
        ('json:{"driver": "raw", "file": {"filename": "a\\u0000b"}}', "filename='a.*: is not the name of a file"),
        ('json:{"driver": "raw", "file": {"filename": "\\ud800"}}', "filename='.*: is not the name of a file"),
        ('json:{"driver": "raw", "file": {"filename": ""}}', "filename='': is not the name of a file"),
        ("json:[]", "is not an object"),
        ("json:{", "is not JSON"),
        ("json:" + "[" * 30000, "is not JSON"),
        ("json:" + " " * 70000, "is not an object of at most"),
        ('json:{"driver": "qcow2"}', "has driver=FORMAT and file.filename=PATH"),
        ('json:{"driver": "file", "file": {"filename": "x"}}', "has driver=FORMAT and file.filename=PATH"),
    ],
)
def test_all_else_is_refused_by_its_key(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        named(text, None, image_opts=False)


def test_options_that_are_none() -> None:
    with pytest.raises(UsageError, match=r"'disk\.qcow2' is not key=value"):
        named("disk.qcow2", None, image_opts=True)
    with pytest.raises(UsageError, match="',' is not key=value"):
        named(",,", None, image_opts=True)
    with pytest.raises(UsageError, match="-f and the notation"):
        named("driver=qcow2,file.filename=x", "qcow2", image_opts=True)


def test_qemu_img_converts_the_same_disk(tmp_path: Path, qemu_img: QemuImg) -> None:
    path, ours, theirs = tmp_path / "disk.img", tmp_path / "ours.raw", tmp_path / "theirs.raw"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 7 64K 64K")
    wanted = f"driver=qcow2,file.driver=file,file.filename={path}"
    qemu_img("convert", "--image-opts", "-O", "raw", wanted, theirs)
    command = [sys.executable, "-m", "vmconv", "convert", "-q", "--image-opts", wanted, str(ours)]
    subprocess.run(command, check=True)
    assert ours.read_bytes() == theirs.read_bytes()
    done = subprocess.run([*command[:-1], "x", "y"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "several sources are named by their paths" in done.stderr
