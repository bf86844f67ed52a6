"""QEMU's own tools, which hold locks on images."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 600.0
"""Seconds that another program may take to start."""


@contextlib.contextmanager
def qemu_io(path: Path, format_name: str, *, writing: bool = True) -> Iterator[None]:
    """Keeps an image open in qemu-io."""
    mode = [] if writing else ["-r"]
    command = ["qemu-io", *mode, "-f", format_name, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write("length\n")
            process.stdin.flush()
            # The answer to the first command comes when the image is open; the end of its input ends the program.
            assert process.stdout.readline()
            yield
        finally:
            process.stdin.close()
