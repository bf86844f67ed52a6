"""The images that the conformance kit ships: QEMU reads the disk that they are said to hold, and the kit uses them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.requirements import oracle_program
from support.sample_images import MADE
from vmconv.plugin import File, Image, Opener
from vmconv.testing import ReaderTests, SampleImage, sample_disk, sample_images
from vmconv.testing.samples import ARCHIVE
from vmconv_vdi import Vdi

SAMPLES = {one.name: one for one in sample_images()}


def test_the_archive_is_what_the_command_makes() -> None:
    made = [(one.name, one.format, " ".join(one.options)) for one in MADE]
    assert [(one.name, one.format, one.options) for one in SAMPLES.values()] == made
    assert ARCHIVE.stat().st_size < 32 << 10


@pytest.mark.parametrize("one", MADE, ids=lambda one: one.name)
def test_qemu_reads_the_disk(one: SampleImage, tmp_path: Path) -> None:
    oracle_program("qemu-img")
    (tmp_path / "disk.raw").write_bytes(sample_disk())
    (tmp_path / one.name).write_bytes(SAMPLES[one.name].data)
    driver = {"vhd": "vpc"}.get(one.format, one.format)
    command = ["qemu-img", "compare", "-f", "raw", "-F", driver, str(tmp_path / "disk.raw"), str(tmp_path / one.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class _Blind(Vdi):
    """Reads all blocks as zeros."""

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv.plugin import Extents, Kind

        image = super().read(file, opener, snapshot=snapshot)
        return Image("vdi", file, image.size, lambda: Extents.filled(image.size, Kind.ZERO))


def test_the_kit_finds_a_reader_of_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = ReaderTests()
    monkeypatch.setattr(ReaderTests, "format", Vdi(), raising=False)
    kit.test_images_that_qemu_made_are_read()
    monkeypatch.setattr(ReaderTests, "format", _Blind(), raising=False)
    with pytest.raises(AssertionError, match=r"\.vdi"):
        kit.test_images_that_qemu_made_are_read()
