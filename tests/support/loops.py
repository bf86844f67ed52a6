"""Loop devices for tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.requirements import missing


@contextmanager
def loop_device(file: Path, *flags: str) -> Iterator[Path]:
    """Yields a loop device of a file, detached afterwards; skips with the reason where none can be had."""
    attach = ["losetup", "--find", "--show", *flags, str(file)]
    done = subprocess.run(attach, capture_output=True, text=True, check=False)
    if done.returncode:
        missing("reflink", f"losetup: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
