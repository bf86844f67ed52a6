"""A directory to mount on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounting import mount_point


@pytest.fixture
def point() -> Iterator[Path]:
    with mount_point() as directory:
        yield directory
