"""A real Linux guest boots from a converted disk in every format, reads its payload, and what it writes comes back."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import vmconv
from support.disks import QemuImg
from support.guest import answer_on, boot, make_guest, run, what_is_missing
from support.requirements import missing
from support.variants import Variant, is_compressed, make, qemu_name, self_contained, title

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A raw disk that boots, and the sum of its payload."""
    lack = what_is_missing()
    if lack:
        missing("oracle", lack)
    return make_guest(tmp_path_factory.mktemp("guest"))


def answer_in(text: str) -> str:
    """Returns the two lines that the guest says; its token differs at each boot."""
    found = re.search(r"^token [0-9a-f-]{36}\npayload [0-9a-f]{64}  -\n", text.replace("\r", ""), re.MULTILINE)
    assert found, text
    return found[0]


@pytest.mark.parametrize("variant", self_contained(), ids=title)
def test_a_guest_boots_and_what_it_writes_is_there_after_converting_back(
    xfs_dir: Path, qemu_img: QemuImg, guest: tuple[Path, str], variant: Variant
) -> None:
    raw, back = xfs_dir / "guest.raw", xfs_dir / "back.raw"
    run("cp", "--sparse=always", guest[0], raw)
    compressed = is_compressed(variant)
    image = make(raw, variant, xfs_dir, zero_copy="auto" if compressed else "require")
    before = hashlib.sha256(raw.read_bytes()).digest()

    # QEMU does not write to compressed grains: there, what the guest writes goes to a file of QEMU's own.
    said = answer_in(boot(image, qemu_name(variant), ["snapshot=on"] if compressed else []))

    assert guest[1] in said
    vmconv.convert(str(image), str(back), source_format=variant[0])
    qemu_img("compare", "-f", "raw", "-F", qemu_name(variant), back, image)
    if compressed:
        qemu_img("compare", "-f", "raw", "-F", "raw", raw, back)
    else:
        assert answer_on(back) == said
    # The guest wrote to blocks that it shared with the source.
    assert hashlib.sha256(raw.read_bytes()).digest() == before
