"""The conformance kit for formats that are only read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = """
from vmconv.plugin import Format, ImageError
from vmconv.testing import FormatTests, Sample, random_bytes


class Flat(Format):
    name, title, suffixes, can_write = "flat", "flat image", (".flat",), {can_write}

    def options(self):
        from dataclasses import make_dataclass
        return make_dataclass("Options", [], frozen=True)

    def probe(self, file):
        return file.read(0, min(8, file.size)) == b"FLATDISK"

    def read(self, file, opener, *, snapshot=None):
        from vmconv.plugin import Extents, Image
        if snapshot is not None or file.size < 1024 or not self.probe(file):
            raise ImageError(f"{{file.name}}: no flat image")
        size = (file.size - 512) // 512 * 512
        return Image("flat", file, size, lambda: Extents.whole(file).window(512, size))

    def check(self, image):
        from vmconv.plugin import CheckReport
        return CheckReport(leaks=(), leak_count=0, image_end=image.file.size)


class TestFlat(FormatTests):
    format = Flat()

    def sound(self, variant):
        return Sample(b"FLATDISK".ljust(512, b"\\0") + random_bytes(8192), [(0, 8)])
"""


@pytest.mark.parametrize(("can_write", "passes"), [(False, True), (True, False)], ids=["only read", "without a writer"])
def test_a_format_that_is_only_read_passes_the_kit(can_write: bool, passes: bool, tmp_path: Path) -> None:
    """The same format that claims to have a writer does not."""
    (tmp_path / "test_flat.py").write_text(SOURCE.format(can_write=can_write))
    flags = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-k", "not heavy"]
    command = [sys.executable, "-m", "pytest", *flags, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode == 0) is passes, done.stdout
    assert "passed" in done.stdout
