"""`vmconv mount URL`: one disk of a server in every format, as files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

import vmconv
from support.daemons import sshd
from support.disks import MIB, QemuImg
from support.mounting import mount_point, mounted, need_fuse
from support.nbd import served
from support.web import Handler, Server, sparse_disk
from vmconv.cli.main import main

SIZE = 24 * MIB


@pytest.fixture
def point() -> Iterator[Path]:
    need_fuse()
    with mount_point() as directory:
        yield directory


@pytest.fixture
def raw(web: Server) -> Path:
    """A raw disk; the server has it as disk.vhdx and disk.qcow2."""
    made = sparse_disk(web.directory.parent / "disk.raw", SIZE, [(0, 5 * MIB + 512), (SIZE - MIB, MIB)])
    for suffix in ("vhdx", "qcow2"):
        vmconv.convert(made, web.directory / f"disk.{suffix}")
    return made


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_a_disk_of_a_web_server_is_shown_as_a_local_one(web: Server, raw: Path, point: Path, qemu_img: QemuImg) -> None:
    with mounted(web.directory / "disk.vhdx", point):
        wanted = {path.name for path in (point / "disk.vhdx").iterdir()}
    with mounted(web.url("disk.vhdx"), point):
        assert os.listdir(point) == ["disk.vhdx"]
        assert {path.name for path in (point / "disk.vhdx").iterdir()} == wanted
        qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, point / "disk.vhdx/qcow2/disk.qcow2")
        qemu_img("compare", "-f", "raw", "-F", "vmdk", raw, point / "disk.vhdx/vmdk/disk.vmdk")
        assert digest(point / "disk.vhdx/raw/disk.raw") == digest(raw)
        assert (point / "disk.vhdx/raw/disk.raw").stat().st_mode & 0o777 == 0o400


def test_a_disk_of_an_nbd_server_is_shown_in_the_format_that_is_named(web: Server, raw: Path, point: Path) -> None:
    with served(web.directory / "disk.qcow2", "--persistent", "--as", "vhdx", "-x", "some") as running:
        with mounted(running.uri, point, "-f", "raw", "--formats", "raw"):
            (shown,) = point.glob("*/raw/*")
            assert shown.stat().st_size == running.sizes["some"]
        with mounted(running.uri, point, "-f", "vhdx", "--formats", "raw"):
            (shown,) = point.glob("*/raw/*")
            assert digest(shown) == digest(raw)


def test_a_disk_of_another_machine_is_shown(
    web: Server, raw: Path, point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sshd").mkdir()
    with sshd(tmp_path / "sshd") as (port, programs):
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        url = f"ssh://127.0.0.1:{port}{web.directory}/disk.qcow2"
        with mounted(url, point, "--formats", "raw"):
            assert digest(point / "disk.qcow2/raw/disk.raw") == digest(raw)


def test_in_the_background_the_connection_is_kept(web: Server, raw: Path, point: Path) -> None:
    command = [sys.executable, "-m", "vmconv", "mount", "--fork", web.url("disk.qcow2"), str(point)]
    subprocess.run(command, check=True, timeout=60)
    assert digest(point / "disk.qcow2/raw/disk.raw") == digest(raw)
    subprocess.run(["fusermount3", "-u", str(point)], check=True)


def test_after_a_change_the_next_open_shows_the_new_disk(web: Server, raw: Path, point: Path) -> None:
    with mounted(web.url("disk.qcow2"), point, "--formats", "raw") as running:
        shown = point / "disk.qcow2/raw/disk.raw"
        with open(shown, "rb", buffering=0) as opened:
            assert opened.read(512) == raw.read_bytes()[:512]
            other = sparse_disk(web.directory.parent / "other.raw", SIZE, [(MIB, 7 * MIB)])
            vmconv.convert(other, web.directory / "disk.qcow2", force=True)
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(opened.fileno(), 2 * MIB, 2 * MIB)
        assert digest(shown) == digest(other)
    assert "changed while it was being read" in running.said


def test_a_server_that_fails_for_a_while_is_asked_again(web: Server, raw: Path, point: Path) -> None:
    def fails(handler: Handler, _first: int, _last: int) -> bool:
        handler.answer(403, {}, b"")
        return True

    with mounted(web.url("disk.qcow2"), point, "--formats", "raw"):
        shown = point / "disk.qcow2/raw/disk.raw"
        web.spoil = fails
        with pytest.raises(OSError, match="Input/output error"):
            shown.read_bytes()
        web.spoil = None
        assert digest(shown) == digest(raw)


def test_ids_stay_the_same_until_the_object_changes(web: Server, raw: Path, point: Path) -> None:
    def shown_id() -> str:
        with mounted(web.url("disk.qcow2"), point, "--formats", "vhdx"):
            return str(vmconv.info(point / "disk.qcow2/vhdx/disk.vhdx")["disk"]["identity"])

    first = shown_id()
    assert shown_id() == first
    os.utime(web.directory / "disk.qcow2", ns=(1, 1))
    assert shown_id() != first


@pytest.mark.parametrize(
    ("url", "flags", "said"),
    [
        ("http://127.0.0.1:1/disk.raw", [], "cannot be reached"),
        ("nosuch://host/disk.raw", [], "nosuch"),
        ("{}/missing.qcow2", [], "404"),
        ("{}/disk.qcow2", ["--allow-other"], "other users"),
        ("{}/disk.qcow2", ["--writable"], "is for a local image"),
        ("{}/disk.qcow2", ["--writable", "--overlay", "layer.qcow2"], "is for a local image"),
        ("{}/disk.qcow2", ["-f", "vhdx"], "no VHDX signature"),
    ],
)
def test_what_cannot_be_shown_is_an_error_before_it_is_mounted(
    web: Server, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, flags: list[str], said: str
) -> None:
    (tmp_path / "point").mkdir()
    assert main(["mount", *flags, url.format(web.url("")[:-1]), str(tmp_path / "point")]) != 0
    assert said in capsys.readouterr().err


def test_a_layer_is_not_served_on_a_url(web: Server, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--writable", web.url("disk.qcow2")]) == 2
    assert "is for a local image" in capsys.readouterr().err
