"""A host with libvirt and QEMU for one test, without any daemon."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.requirements import oracle_program


class LibvirtHost:
    """A libvirt that runs within virsh, with all its files in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._virsh = oracle_program("virsh")
        (directory / "root" / "etc").mkdir(parents=True)
        # Everything runs as root, without AppArmor, and without virtlogd, which is a daemon of its own.
        names = ("user", "group", "swtpm_user", "swtpm_group")
        lines = [f'{name} = "root"' for name in names]
        lines += ['security_driver = "none"', 'stdio_handler = "file"', "dynamic_ownership = 0", "remember_owner = 0"]
        (directory / "root" / "etc" / "qemu.conf").write_text("\n".join(lines) + "\n")

    def run(self, *commands: str, timeout: int = 120) -> str:
        """Returns what virsh prints. It runs all commands, and this fails if the last one does."""
        uri = f"qemu:///embed?root={self.directory}/root"
        done = subprocess.run(
            [self._virsh, "-q", "-c", uri, "; ".join(commands)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory for a host. Names of Unix sockets have 107 bytes, so pytest's directories are too deep."""
    with tempfile.TemporaryDirectory(prefix="vmconv-") as directory:
        yield Path(directory)
