"""Sources at ssh://, by sshd and the system's ssh."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmconv
from support.daemons import sshd
from support.disks import MIB, QemuImg
from support.web import sparse_disk
from vmconv.errors import AccessError, ReadError, UsageError
from vmconv.io.schemes import sftp


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with sshd(tmp_path_factory.mktemp("sshd")) as (port, programs):
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{programs}:{before}"
        yield port
        os.environ["PATH"] = before


def url(port: int, path: Path | str, user: str = "") -> str:
    return f"ssh://{user}127.0.0.1:{port}{path}"


def test_an_image_of_another_machine_is_converted(port: int, tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", 24 * MIB, [(0, 9 * MIB + 512), (20 * MIB, MIB)])
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "a disk.qcow2")
    user = pwd.getpwuid(os.geteuid()).pw_name
    result = vmconv.convert(url(port, f"{tmp_path}/a%20disk.qcow2", f"{user}@"), tmp_path / "made.vhdx")
    qemu_img("compare", raw, tmp_path / "made.vhdx")
    assert result.copies[0].reason == "a disk.qcow2 comes over the network"


def test_servers_may_send_less_than_was_asked_for(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenSSH sends 256 KiB less 1 KiB at once.
    monkeypatch.setattr(sftp.SftpFile, "unit", 1 << 20)
    monkeypatch.setattr(sftp, "_LONGEST", 1 << 20)
    raw = sparse_disk(tmp_path / "disk.raw", 9 * MIB, [(0, 9 * MIB)])
    vmconv.convert(url(port, raw), tmp_path / "made.raw")
    assert (tmp_path / "made.raw").read_bytes() == raw.read_bytes()


def test_what_ssh_or_the_server_says_is_the_error(port: int, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="cannot be opened: No such file"):
        vmconv.info(url(port, tmp_path / "other.raw"))
    with pytest.raises(AccessError, match="is not a regular file"):
        vmconv.info(url(port, tmp_path))
    with pytest.raises(ReadError, match=r"Permission denied \(publickey"):
        vmconv.info(url(port, tmp_path / "disk.raw", "nobody-of-that-name@"))
    with pytest.raises(ReadError, match="port 1: Connection refused"):
        vmconv.info(url(1, tmp_path / "disk.raw"))


def test_a_file_that_changes_is_an_error(port: int, tmp_path: Path) -> None:
    from vmconv.interface.scheme import parse_url

    raw = sparse_disk(tmp_path / "disk.raw", MIB, [(0, MIB)])
    file = sftp.SftpFile(parse_url(url(port, raw)))
    try:
        file.read_into(0, memoryview(bytearray(MIB)))
        with raw.open("ab") as grown:
            grown.write(bytes(512))
        with pytest.raises(AccessError, match="changed while it was being read"):
            file.read_into(0, memoryview(bytearray(MIB)))
    finally:
        file.close()


@pytest.mark.parametrize(
    "text",
    [
        "ssh://-oProxyCommand=touch%20x/disk.raw",
        "ssh:///disk.raw",
        "ssh://host",
        "ssh://host/",
        "ssh://u:secret@host/disk.raw",
        "ssh://host/disk.raw?x=y",
        "ssh://host/disk%00.raw",
    ],
)
def test_a_url_without_meaning_starts_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sftp, "PROGRAM", "/nonexistent/ssh")
    with pytest.raises(UsageError) as caught:
        vmconv.info(text)
    assert "secret" not in str(caught.value)


def test_without_a_client_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sftp, "PROGRAM", "/nonexistent/ssh")
    with pytest.raises(AccessError, match="cannot be started") as caught:
        vmconv.info("ssh://host/disk.raw")
    assert "openssh-client" in (caught.value.hint or "")


SERVERS = {
    "no server": (b"Welcome!\n", "sends a packet of"),
    "old": (b"\0\0\0\5\2\0\0\0\2", "is not an SFTP server"),
    "endless": (b"\x7f\xff\xff\xff", "sends a packet of"),
    "nothing": (b"", "closed the connection"),
}


@pytest.mark.parametrize("case", SERVERS)
def test_another_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    data, said = SERVERS[case]
    (tmp_path / "answer").write_bytes(data)
    program = tmp_path / "ssh"
    # The packet INIT has 9 bytes.
    program.write_text(f"#!/bin/sh\nhead -c 9 > /dev/null\ncat {tmp_path}/answer\n")
    program.chmod(0o755)
    monkeypatch.setattr(sftp, "PROGRAM", str(program))
    with pytest.raises(ReadError, match=said):
        vmconv.info("ssh://host/disk.raw")
