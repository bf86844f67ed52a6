"""Servers of other programs on loopback, for sources at URLs."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.requirements import missing, oracle_program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(ready: object, process: subprocess.Popen[bytes]) -> None:
    """Waits until `ready`, a path or a port, is there."""
    for _ in range(3000):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        if isinstance(ready, Path):
            if ready.exists():
                return
        else:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(str(ready)))) == 0:
                    return
        time.sleep(0.01)
    raise AssertionError("the server does not begin")


@contextmanager
def running(command: Sequence[str | Path], ready: object) -> Iterator[None]:
    """Runs a server during the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(ready, process)
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def sshd(directory: Path) -> Iterator[tuple[int, Path]]:
    """Yields the port of an SSH server of this user, and a directory with a `ssh` that can sign in there."""
    server = Path("/usr/sbin/sshd")
    if not server.exists():
        missing("oracle", "sshd is not installed")
    keys = directory / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        command = [oracle_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(command, check=True)
    port = free_port()
    (keys / "authorized").write_text((keys / "user.pub").read_text())
    (keys / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/authorized\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        "Subsystem sftp internal-sftp\n"
    )
    (keys / "known").write_text(f"[127.0.0.1]:{port} {(keys / 'host.pub').read_text()}")
    (keys / "config").write_text(
        f"Host *\n  IdentityFile {keys}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {keys}/known\n"
        "  StrictHostKeyChecking yes\n  BatchMode yes\n"
    )
    programs = directory / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {oracle_program("ssh")} -F {keys}/config "$@"\n')
    (programs / "ssh").chmod(0o755)
    # sshd needs it to separate privileges.
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with running([server, "-D", "-e", "-f", keys / "sshd_config"], port):
        yield port, programs
