"""A directory to mount on."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def point() -> Iterator[Path]:
    """An empty directory to mount on, which other users can reach."""
    directory = Path(tempfile.mkdtemp(prefix="vmconv-mount-"))
    directory.chmod(0o755)
    yield directory
    subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)
    directory.rmdir()
