"""Connections that are given up when nothing arrives."""

from __future__ import annotations

import fcntl
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vmconv_fleet.links.sockets import give_up_after


def _patience(one: socket.socket) -> int:
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


@pytest.mark.parametrize(
    ("family", "host", "form"), [(socket.AF_INET, "127.0.0.1", "{}:{}"), (socket.AF_INET6, "::1", "[{}]:{}")]
)
def test_connections_are_found_by_their_ends(family: socket.AddressFamily, host: str, form: str) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError as exc:
            pytest.skip(f"{host}: {exc.strerror}")
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as near, listener.accept()[0] as far:
            ends = [form.format(*address[:2]) for address in (near.getsockname(), near.getpeername())]
            assert give_up_after({(ends[0], ends[1])}, 3000) == 1
            assert (_patience(near), _patience(far), _patience(listener)) == (3000, 0, 0)
            near.sendall(b"still open")
            assert far.recv(10) == b"still open"


def test_unconnected_sockets_are_not_found() -> None:
    with socket.socket() as lonely:
        lonely.bind(("127.0.0.1", 0))
        assert give_up_after({("127.0.0.1:1", "127.0.0.1:2")}, 3000) == 0
        assert _patience(lonely) == 0


def test_locks_on_files_are_kept(tmp_path: Path) -> None:
    """A process loses all its POSIX locks on a file when it closes any descriptor of it; SQLite's, for example."""
    path = tmp_path / "locked"
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        give_up_after({("127.0.0.1:1", "127.0.0.1:2")}, 3000)
        program = f"import fcntl; fcntl.lockf(open({str(path)!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in other.stderr
