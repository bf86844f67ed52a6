"""The kit of formats on real storage, on the filesystems of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmconv.testing import StorageFormatTests
from vmconv.testing.storage import QemuImg


class OnStorage(StorageFormatTests):
    """Runs on each filesystem that shares blocks; fails without QEMU where this run requires it."""

    @pytest.fixture
    def directory(self, reflink_dir: Path) -> Path:
        return reflink_dir

    @pytest.fixture
    def qemu_img(self, qemu_img: QemuImg) -> QemuImg:
        return qemu_img
